"""`byol-deploy train`: being written."""


def train() -> None:
    raise SystemExit("being written")
