"""Where `edge-server` and `python -m edge_server` begin."""

from common.cli import run


def main() -> None:
    run("edge_server.cli")


if __name__ == "__main__":
    main()
