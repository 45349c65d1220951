/* Faults of a real system, for the tests: preloaded, it counts the calls that touch files below a
   folder and makes one of them fail, come back short, or end the process.

   FAULT_UNDER   only files whose path has this in it
   FAULT_CALLS   only these calls, as " pwrite fsync ", and only those if it is set
   FAULT_AT      the number of the call that is hit, from 1
   FAULT_DO      "kill", "short" (from that call on), or the number of an errno
   FAULT_LOG     a file of three numbers: calls, bytes read, bytes written */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long spare[3], *counts = spare, at;
static const char *under, *calls, *what;

__attribute__((constructor)) static void setup(void) {
  const char *log = getenv("FAULT_LOG"), *number = getenv("FAULT_AT");
  under = getenv("FAULT_UNDER");
  calls = getenv("FAULT_CALLS");
  what = getenv("FAULT_DO");
  at = number ? atol(number) : 0;
  int fd = log ? open(log, O_RDWR) : -1;
  if (fd >= 0) {
    void *shared = mmap(NULL, sizeof spare, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED) counts = shared;
    close(fd);
  }
}

/* 0: go on; 1: be short; -1: fail, errno is set. */
static int hit(const char *name, const char *path) {
  char word[64];
  if (!under || !strstr(path, under)) return 0;
  snprintf(word, sizeof word, " %s ", name);
  if (calls && !strstr(calls, word)) return 0;
  long number = __atomic_add_fetch(counts, 1, __ATOMIC_SEQ_CST);
  if (!at || !what) return 0;
  if (!strcmp(what, "short")) return number >= at;
  if (number != at) return 0;
  if (!strcmp(what, "kill")) raise(SIGKILL);
  errno = atoi(what);
  return -1;
}

static int hit_fd(const char *name, int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return hit(name, path);
}

static int below(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0 || !under) return 0;
  path[length] = 0;
  return strstr(path, under) != NULL;
}

static void add(int place, int fd, ssize_t count) {
  if (count > 0 && below(fd)) __atomic_add_fetch(&counts[place], count, __ATOMIC_SEQ_CST);
}

#define REAL(result, name, ...)                                       \
  static result (*real)(__VA_ARGS__);                                 \
  if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

ssize_t pread64(int fd, void *data, size_t size, off_t offset) {
  REAL(ssize_t, "pread64", int, void *, size_t, off_t)
  int how = hit_fd("pread", fd);
  if (how < 0) return -1;
  ssize_t count = real(fd, data, how && size > 1 ? (size + 1) / 2 : size, offset);
  add(1, fd, count);
  return count;
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off_t offset, int flags) {
  REAL(ssize_t, "preadv64v2", int, const struct iovec *, int, off_t, int)
  int how = hit_fd("preadv", fd);
  if (how < 0) return -1;
  struct iovec part = parts[0];
  if (how && part.iov_len > 1) part.iov_len = (part.iov_len + 1) / 2;
  ssize_t count = n == 1 ? real(fd, &part, 1, offset, flags) : real(fd, parts, n, offset, flags);
  add(1, fd, count);
  return count;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
  REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t)
  int how = hit_fd("pwrite", fd);
  if (how < 0) return -1;
  ssize_t count = real(fd, data, how && size > 1 ? (size + 1) / 2 : size, offset);
  add(2, fd, count);
  return count;
}

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t)
  int how = hit_fd("write", fd);
  if (how < 0) return -1;
  ssize_t count = real(fd, data, how && size > 1 ? (size + 1) / 2 : size);
  add(2, fd, count);
  return count;
}

int fsync(int fd) {
  REAL(int, "fsync", int)
  return hit_fd("fsync", fd) < 0 ? -1 : real(fd);
}

int ftruncate64(int fd, off_t size) {
  REAL(int, "ftruncate64", int, off_t)
  return hit_fd("ftruncate", fd) < 0 ? -1 : real(fd, size);
}

int fallocate(int fd, int mode, off_t offset, off_t size) {
  REAL(int, "fallocate", int, int, off_t, off_t)
  return hit_fd("fallocate", fd) < 0 ? -1 : real(fd, mode, offset, size);
}

int open64(const char *path, int flags, ...) {
  REAL(int, "open64", const char *, int, ...)
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return hit("open", path) < 0 ? -1 : real(path, flags, mode);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, "mkdir", const char *, mode_t)
  return hit("mkdir", path) < 0 ? -1 : real(path, mode);
}

int unlink(const char *path) {
  REAL(int, "unlink", const char *)
  return hit("unlink", path) < 0 ? -1 : real(path);
}

int unlinkat(int fd, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int)
  return hit_fd("unlinkat", fd) < 0 ? -1 : real(fd, path, flags);
}

int rmdir(const char *path) {
  REAL(int, "rmdir", const char *)
  return hit("rmdir", path) < 0 ? -1 : real(path);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *)
  return hit("rename", from) < 0 ? -1 : real(from, to);
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
  REAL(int, "renameat2", int, const char *, int, const char *, unsigned)
  return hit("renameat2", from) < 0 ? -1 : real(from_fd, from, to_fd, to, flags);
}
