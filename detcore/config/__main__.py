"""`python -m detcore.config --check` is how a launcher asks before it starts anything: `detcore.check`."""

from detcore.check import main

if __name__ == "__main__":
    main()
