// found before GCC's own header, which lacks what the optimiser must know of these instructions. GCC 12.2, and every other
// one without the mending of its bug 114098, takes ldtilecfg to read 8 bytes, not 64: stores to the rest of a
// configuration are left out where it is built and loaded in one function, and the processor faults on what it finds in
// their place. Of tile loads no GCC is told that they read memory.

#include_next <amxtileintrin.h>

#if defined(__x86_64__) && !defined(EQUIP_AMXTILEINTRIN_H)
#    define EQUIP_AMXTILEINTRIN_H

#    define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))

#    undef  _tile_loadd_internal
#    define _tile_loadd_internal(dst, base, stride)                                                          \
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #dst                                                   \
                         : : "r"((const void *)(base)), "r"((long)(stride)) : "memory")

#    undef  _tile_stream_loadd_internal
#    define _tile_stream_loadd_internal(dst, base, stride)                                                   \
        __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #dst                                                 \
                         : : "r"((const void *)(base)), "r"((long)(stride)) : "memory")
#endif
