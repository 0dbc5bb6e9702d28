/* The kernel's permission to use tiles. */
#include "tiles.h"

#if TILES && !defined(SAGE_TILE_MODEL)
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#endif

/* Whether this process may use tiles. Asks the kernel for the permission, which holds for all
 * threads; without it, the first instruction on a tile would end the process. */
int sage_has_tiles(void) {
#if !TILES
    return 0;
#elif defined(SAGE_TILE_MODEL)
    return 1;
#else
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}
