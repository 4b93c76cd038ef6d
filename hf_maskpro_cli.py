"""
Where the script `hf-maskpro` begins. It is no module of the package, since Python imports a package before anything in
it: this one tells the package, by having been imported, that only the command is wanted.
"""


def main() -> None:
    """Run the command."""
    from hf_maskpro.cli import main

    main()


def quickstart_row() -> None:
    """Run one method of the quickstart, in a process that it starts."""
    from hf_maskpro.cli import keep_others_quiet

    keep_others_quiet()
    from hf_maskpro.cli.quickstart_row import main

    main()
