"""Where `device-client` and `python -m device_client` begin."""

from common.cli import run


def main() -> None:
    run("device_client.cli")


if __name__ == "__main__":
    main()
