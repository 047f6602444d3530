"""Whether a file is whole: what shows that it is cut, damaged, or several files appended."""
