"""``python -m xbd`` is the command ``xbd``."""

from xbd.cli import main

if __name__ == "__main__":
    main()
