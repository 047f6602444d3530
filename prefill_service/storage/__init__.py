"""The data folder: SQLite files that survive full disks and power cuts, and their backup."""
