"""What a decoder process gives up before it looks at an untrusted file.

It does so itself, because ``preexec_fn`` is not safe in a parent with threads. The request's
resource limits come before anything of the file is read. The file system (``landlock``) and then
the system calls (``seccomp``) are given up last, when the libraries have been loaded.
"""
