/* The AMX matrix unit: whether this process may use it, and the shapes of its tile registers. */
#ifndef AMX_H
#define AMX_H

#include "simd.h"

#if !defined(WITHOUT_AMX) && defined(SIMD_AVX512) && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && \
    defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Ask the system for the unit, once for the process; then say whether it was granted. */
int amx_request(void);
int amx_is_granted(void);

/* gcc's intrinsic tells the compiler of a config's first bytes only, and the others of a local one would be lost. */
INLINE void amx_shape(const TileConfig *config) { __asm__ volatile("ldtilecfg %0" : : "m"(*config)); }

#endif
#endif
