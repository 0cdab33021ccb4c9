"""Run the command `ranvier` as `python -m ranvier`."""

from ranvier.graph.commands.entry import main

if __name__ == "__main__":
    main()
