"""The Sudoku that a bundled model solves: its rules, how it is written, and how it is drawn on a terminal."""
