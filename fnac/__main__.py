"""The ``fnac`` command, also ``python -m fnac``: says what to install where its libraries are missing."""

from __future__ import annotations

import sys

from fnac.memory import keep_freed_memory


def main() -> None:
    """Run the command line of :mod:`fnac.cli`, in a process that keeps the memory it frees."""
    keep_freed_memory()
    try:
        from fnac.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"fnac: {error}; the training stack's libraries come with "
            "`pip install 'fnac-kernels[train]'`, in the repository `pip install -e '.[train]'`"
        )
    run()


if __name__ == "__main__":
    main()
