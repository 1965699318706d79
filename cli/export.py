"""`byol-deploy export`: being written."""


def export() -> None:
    raise SystemExit("being written")
