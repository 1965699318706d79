"""`byol-deploy doctor`: being written."""


def doctor() -> None:
    raise SystemExit("being written")
