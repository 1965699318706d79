"""The command line, installed as ``byol_deploy.cli``: one file per command.

A command is a door: it parses, calls one library function and prints through :mod:`.output`.
"""
