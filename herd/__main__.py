"""python -m herd"""

from herd.cli.main import main

if __name__ == "__main__":
    main()
