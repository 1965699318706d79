"""`byol-deploy demo`: being written."""


def demo() -> None:
    raise SystemExit("being written")
