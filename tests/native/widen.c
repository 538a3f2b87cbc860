/* A preloaded library that makes races in native code likely instead of rare.
 *
 * When a thread has let go of a read-write lock that it held for writing, others may look at what it has just
 * published. Where the thread wrongly goes on to use that itself, the wrong moment is some nanoseconds long.
 * This library lets the thread sleep right there, so that the others get their turn. It changes no result of
 * any call, and code that is right doesn't notice but for the time.
 *
 *   WIDEN_US       how long to sleep, in microseconds; 0 or absent: not at all
 *   WIDEN_THREADS  "application" (default): all threads but those of librdkafka, whose names begin with "rdk:";
 *                  "library": only those; "all"
 *
 * Built and preloaded by tests/native/widening.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

enum { HELD_MAX = 16 };

typedef int lock_function(pthread_rwlock_t *);

static lock_function *real_wrlock, *real_trywrlock, *real_unlock;
static long pause_us;
static int pauses_application = 1, pauses_library;
static atomic_ulong pauses;

/* The locks that this thread holds for writing. One too many is forgotten, and then not slept after. */
static __thread pthread_rwlock_t *held[HELD_MAX];

__attribute__((constructor)) static void begin(void) {
  const char *us = getenv("WIDEN_US"), *threads = getenv("WIDEN_THREADS");
  real_wrlock = (lock_function *)dlsym(RTLD_NEXT, "pthread_rwlock_wrlock");
  real_trywrlock = (lock_function *)dlsym(RTLD_NEXT, "pthread_rwlock_trywrlock");
  real_unlock = (lock_function *)dlsym(RTLD_NEXT, "pthread_rwlock_unlock");
  pause_us = us ? atol(us) : 0;
  if (threads && strcmp(threads, "application")) {
    pauses_library = 1;
    pauses_application = !strcmp(threads, "all");
  }
}

/* How often a thread of this process was made to sleep: a test sees by it that it has tested something. */
unsigned long widen_pauses(void) { return atomic_load(&pauses); }

static void take(pthread_rwlock_t *lock) {
  for (int n = 0; n < HELD_MAX; n++)
    if (!held[n]) {
      held[n] = lock;
      return;
    }
}

static int give(pthread_rwlock_t *lock) {
  for (int n = 0; n < HELD_MAX; n++)
    if (held[n] == lock) {
      held[n] = NULL;
      return 1;
    }
  return 0;
}

static int is_of_library(void) {
  char name[16 + 1] = "";
  prctl(PR_GET_NAME, name);
  return !strncmp(name, "rdk:", 4);
}

static void pause_here(void) {
  struct timespec left = {pause_us / 1000000, pause_us % 1000000 * 1000};
  if (!(is_of_library() ? pauses_library : pauses_application)) return;
  atomic_fetch_add(&pauses, 1);
  while (nanosleep(&left, &left)) {
  }
}

/* Other libraries' constructors may take locks before ours has run. */
#define REAL(function) (real_##function ? real_##function : (begin(), real_##function))

int pthread_rwlock_wrlock(pthread_rwlock_t *lock) {
  int error = REAL(wrlock)(lock);
  if (!error) take(lock);
  return error;
}

int pthread_rwlock_trywrlock(pthread_rwlock_t *lock) {
  int error = REAL(trywrlock)(lock);
  if (!error) take(lock);
  return error;
}

int pthread_rwlock_unlock(pthread_rwlock_t *lock) {
  int was_writer = give(lock), error = REAL(unlock)(lock);
  if (!error && was_writer && pause_us > 0) pause_here();
  return error;
}
