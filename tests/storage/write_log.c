/* Logs what a process writes below a folder, and what it syncs, in the order in which it does.
 *
 * cc -shared -fPIC -o write_log.so write_log.c
 * WRITE_LOG=FILE WRITE_LOG_ROOT=FOLDER LD_PRELOAD=./write_log.so PROGRAM
 *
 * A record is: operation (1 byte), length of path (u32), of second path (u32), of data (u32),
 * offset (u64), then the paths and the data. One lock is held over each operation and its record,
 * so that the order is that of the operations.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static char root[PATH_MAX];

__attribute__((constructor)) static void start(void) {
    const char *file = getenv("WRITE_LOG"), *folder = getenv("WRITE_LOG_ROOT");
    if (!file || !folder || !realpath(folder, root)) abort();
    log_fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0) abort();
}

static int below_root(const char *path) {
    size_t length = strlen(root);
    return log_fd >= 0 && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path that a name means below an open folder; its last part may not exist. */
static int resolve(int at, const char *name, char *path) {
    char joined[2 * PATH_MAX], folder[PATH_MAX];
    if (name[0] == '/') {
        snprintf(joined, sizeof joined, "%s", name);
    } else {
        char link[64];
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t n = readlink(link, folder, sizeof folder - 1);
        if (n < 0) return 0;
        folder[n] = 0;
        snprintf(joined, sizeof joined, "%s/%s", folder, name);
    }
    char *last = strrchr(joined, '/');
    if (last == joined) return 0;
    *last = 0;
    if (!realpath(joined, folder)) return 0;
    return snprintf(path, PATH_MAX, "%s/%s", folder, last + 1) < PATH_MAX && below_root(path);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below_root(path) && !strstr(path, " (deleted)");
}

static void put(const void *data, size_t length) {
    while (length) {
        ssize_t n = syscall(SYS_write, log_fd, data, length);
        if (n < 0) abort();
        data = (const char *)data + n;
        length -= n;
    }
}

static void record(char op, const char *path, const char *other, uint64_t offset, const void *data,
                   size_t length) {
    int error = errno;
    uint32_t sizes[3] = {strlen(path), strlen(other), length};
    put(&op, 1);
    put(sizes, sizeof sizes);
    put(&offset, sizeof offset);
    put(path, sizes[0]);
    put(other, sizes[1]);
    put(data, length);
    errno = error;
}

#define LOCKED pthread_mutex_lock(&lock)
#define UNLOCKED pthread_mutex_unlock(&lock)

static int open_logged(int at, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    LOCKED;
    int writes = (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE;
    int logged = writes && resolve(at, name, path);
    int existed = logged && faccessat(AT_FDCWD, path, F_OK, 0) == 0;
    int fd = syscall(SYS_openat, at, name, flags, mode);
    if (fd >= 0 && logged && !existed) record('C', path, "", 0, "", 0);
    if (fd >= 0 && logged && existed && (flags & O_TRUNC)) record('T', path, "", 0, "", 0);
    UNLOCKED;
    return fd;
}

#define MODE_OF(flags)                                    \
    mode_t mode = 0;                                      \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                \
        va_list arguments;                                \
        va_start(arguments, flags);                       \
        mode = va_arg(arguments, mode_t);                 \
        va_end(arguments);                                \
    }

int open(const char *name, int flags, ...) {
    MODE_OF(flags) return open_logged(AT_FDCWD, name, flags, mode);
}
int open64(const char *name, int flags, ...) {
    MODE_OF(flags) return open_logged(AT_FDCWD, name, flags, mode);
}
int openat(int at, const char *name, int flags, ...) {
    MODE_OF(flags) return open_logged(at, name, flags, mode);
}
int openat64(int at, const char *name, int flags, ...) {
    MODE_OF(flags) return open_logged(at, name, flags, mode);
}

static ssize_t wrote(int fd, const void *data, ssize_t n, off_t offset) {
    char path[PATH_MAX];
    if (n > 0 && path_of(fd, path)) record('W', path, "", offset, data, n);
    return n;
}

ssize_t write(int fd, const void *data, size_t length) {
    LOCKED;
    ssize_t n = syscall(SYS_write, fd, data, length);
    char path[PATH_MAX];
    if (n > 0 && path_of(fd, path)) wrote(fd, data, n, lseek(fd, 0, SEEK_CUR) - n);
    UNLOCKED;
    return n;
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    LOCKED;
    ssize_t n = wrote(fd, data, syscall(SYS_pwrite64, fd, data, length, offset), offset);
    UNLOCKED;
    return n;
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    return pwrite(fd, data, length, offset);
}

static int cut(int fd, off_t length) {
    char path[PATH_MAX];
    LOCKED;
    int result = syscall(SYS_ftruncate, fd, length);
    if (!result && path_of(fd, path)) record('T', path, "", length, "", 0);
    UNLOCKED;
    return result;
}
int ftruncate(int fd, off_t length) { return cut(fd, length); }
int ftruncate64(int fd, off64_t length) { return cut(fd, length); }
static int cut_path(const char *name, off_t length) {
    char path[PATH_MAX];
    LOCKED;
    int result = syscall(SYS_truncate, name, length);
    if (!result && resolve(AT_FDCWD, name, path)) record('T', path, "", length, "", 0);
    UNLOCKED;
    return result;
}
int truncate(const char *name, off_t length) { return cut_path(name, length); }
int truncate64(const char *name, off64_t length) { return cut_path(name, length); }

static int sync_logged(int fd, long number) {
    char path[PATH_MAX];
    LOCKED;
    int result = syscall(number, fd);
    if (!result && path_of(fd, path)) record('S', path, "", 0, "", 0);
    UNLOCKED;
    return result;
}
int fsync(int fd) { return sync_logged(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_logged(fd, SYS_fdatasync); }

int renameat(int from_at, const char *from, int to_at, const char *to) {
    char old[PATH_MAX], new[PATH_MAX];
    LOCKED;
    int logged = resolve(from_at, from, old) && resolve(to_at, to, new);
    int result = syscall(SYS_renameat, from_at, from, to_at, to);
    if (!result && logged) record('R', old, new, 0, "", 0);
    UNLOCKED;
    return result;
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int at, const char *name, int flags) {
    char path[PATH_MAX];
    LOCKED;
    int logged = resolve(at, name, path);
    int result = syscall(SYS_unlinkat, at, name, flags);
    if (!result && logged) record('U', path, "", 0, "", 0);
    UNLOCKED;
    return result;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int at, const char *name, mode_t mode) {
    char path[PATH_MAX];
    LOCKED;
    int result = syscall(SYS_mkdirat, at, name, mode);
    if (!result && resolve(at, name, path)) record('D', path, "", 0, "", 0);
    UNLOCKED;
    return result;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

/* What this log does not follow is an operation that no replay knows. */
static void refuse(int fd, const char *what) {
    char path[PATH_MAX];
    if (path_of(fd, path)) {
        LOCKED;
        record('?', path, what, 0, "", 0);
        UNLOCKED;
    }
}
void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE)) refuse(fd, "mmap");
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}
void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset) {
    return mmap(address, length, protection, flags, fd, offset);
}
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length,
                        unsigned flags) {
    refuse(out, "copy_file_range");
    return syscall(SYS_copy_file_range, in, in_at, out, out_at, length, flags);
}
