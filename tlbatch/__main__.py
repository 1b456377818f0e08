"""`python -m tlbatch`, for where the command is not on the path."""

from tlbatch.cli import main

if __name__ == "__main__":
    main()
