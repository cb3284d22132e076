/* Linux gives a process the AMX registers only when asked. */
#define _GNU_SOURCE
#include "amx.h"

#if defined(HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>

static int granted = -1;

int amx_request(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    if (granted < 0) granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

int amx_is_granted(void) { return granted > 0; }
#else
typedef int nothing_to_compile;
#endif
