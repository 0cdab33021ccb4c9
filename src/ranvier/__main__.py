"""`python -m ranvier` is the command `ranvier`."""

from ranvier.graph.commands.entry import main

if __name__ == "__main__":
    main()
