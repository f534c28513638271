"""The command `brewjax`, also as `python -m brewjax`."""

from brewjax.devices import use_huge_pages


def main() -> None:
    """Runs the command line, with large memory in huge pages."""
    use_huge_pages()
    from brewjax import cli  # slow to import, and only once

    cli.main()


if __name__ == "__main__":
    main()
