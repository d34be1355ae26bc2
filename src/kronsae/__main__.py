"""``python -m kronsae``: the command line, where the script is not on the PATH."""

from kronsae.cli.main import main

if __name__ == "__main__":
    main()
