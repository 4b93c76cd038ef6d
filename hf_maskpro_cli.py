"""
Where the command begins: the script `hf-maskpro`, and `python -m hf_maskpro_cli`. It is no module of the package,
since Python imports a package before anything in it: this one tells the package, by having been imported, that only
the command is wanted.
"""

import sys


def main() -> None:
    """Run the command."""
    from hf_maskpro.cli import main

    main()


def quickstart_row() -> None:
    """Run one method of the quickstart, in a process that it starts."""
    try:
        from hf_maskpro.cli import keep_others_quiet

        keep_others_quiet()
        from hf_maskpro.cli.quickstart_row import main

        main()
    except KeyboardInterrupt:
        # Ctrl-C goes to the quickstart as well, which has the last word.
        sys.exit(130)


if __name__ == "__main__":
    # The name that the package looks for.
    sys.modules["hf_maskpro_cli"] = sys.modules["__main__"]
    main()
