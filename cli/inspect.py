"""`byol-deploy inspect`: being written."""


def inspect() -> None:
    raise SystemExit("being written")
