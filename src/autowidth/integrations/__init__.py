"""The engine in other people's trainers: one file each, imported only when it is asked for."""
