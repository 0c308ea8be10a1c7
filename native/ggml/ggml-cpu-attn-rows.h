// vectors, the types of the KV cache, and the two products of attention on a few of its rows

#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>

// not the table of 256 KB, which would push the rows out of the cache
#if defined(GGML_CPU_COMPUTE_FP16_TO_FP32)
#define ATTN_FP16_TO_FP32(x) GGML_CPU_COMPUTE_FP16_TO_FP32(x)
#else
#define ATTN_FP16_TO_FP32(x) GGML_CPU_FP16_TO_FP32(x)
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ATTN_PREFETCH(p) __builtin_prefetch(p)
#else
#define ATTN_PREFETCH(p) ((void) (p))
#endif

//
// f32 vectors: ggml's, and what its mappings lack
//

// GGML_CPU_ATTN_SCALAR: the path of all other machines, for tests
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(GGML_CPU_ATTN_SCALAR)

// also under SVE, where ggml's vectors have no size

typedef float32x4_t attn_vec;

#define ATTN_EPR 4 // floats in a vector
#define ATTN_ND  4 // most vectors of an output row at a time

#if !defined(__ARM_FEATURE_SVE)
#define ATTN_HAS_EXP // ggml_v_expf() takes our vectors
#endif

static inline attn_vec attn_zero()                                  { return vdupq_n_f32(0.0f); }
static inline attn_vec attn_set1(float x)                           { return vdupq_n_f32(x); }
static inline attn_vec attn_load(const float * p)                   { return vld1q_f32(p); }
static inline void     attn_store(float * p, attn_vec x)            { vst1q_f32(p, x); }
static inline attn_vec attn_add(attn_vec a, attn_vec b)             { return vaddq_f32(a, b); }
static inline attn_vec attn_mul(attn_vec a, attn_vec b)             { return vmulq_f32(a, b); }
static inline attn_vec attn_max(attn_vec a, attn_vec b)             { return vmaxq_f32(a, b); }
static inline attn_vec attn_fma(attn_vec a, attn_vec b, attn_vec c) { return vfmaq_f32(a, b, c); }

static inline float attn_hmax(attn_vec x) { return vmaxvq_f32(x); }

// out[i] = sum of the elements of the i-th
static inline void attn_sum4(attn_vec a, attn_vec b, attn_vec c, attn_vec d, float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

static inline attn_vec attn_load_f16(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p)));
}

static inline attn_vec attn_set1_f16(ggml_fp16_t x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x)));
}

static inline attn_vec attn_load_bf16(const ggml_bf16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}

static inline attn_vec attn_load_i8(const int8_t * p) {
    uint32_t u;
    memcpy(&u, p, sizeof(u));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(u))))));
}

// 4-bit numbers - 8: of the lower, or upper, halves of the bytes
static inline attn_vec attn_load_u4(const uint8_t * p, bool upper) {
    uint32_t u;
    memcpy(&u, p, sizeof(u));
    u = upper ? (u >> 4) & 0x0F0F0F0F : u & 0x0F0F0F0F;
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vsub_s8(vreinterpret_s8_u32(vdup_n_u32(u)), vdup_n_s8(8))))));
}

#elif (defined(__SSE4_1__) || defined(__AVX__)) && !defined(GGML_CPU_ATTN_SCALAR)

typedef GGML_F32_VEC attn_vec;

#define ATTN_EPR GGML_F32_EPR

#if (defined(__AVX512F__) && defined(__AVX512DQ__)) || (!defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)) || !defined(__AVX__)
#define ATTN_HAS_EXP
#endif

static inline attn_vec attn_zero()                                  { return GGML_F32_VEC_ZERO; }
static inline attn_vec attn_set1(float x)                           { return GGML_F32_VEC_SET1(x); }
static inline attn_vec attn_load(const float * p)                   { return GGML_F32_VEC_LOAD(p); }
static inline void     attn_store(float * p, attn_vec x)            { GGML_F32_VEC_STORE(p, x); }
static inline attn_vec attn_add(attn_vec a, attn_vec b)             { return GGML_F32_VEC_ADD(a, b); }
static inline attn_vec attn_mul(attn_vec a, attn_vec b)             { return GGML_F32_VEC_MUL(a, b); }
static inline attn_vec attn_fma(attn_vec a, attn_vec b, attn_vec c) { return GGML_F32_VEC_FMA(a, b, c); }

static inline float attn_hmax4(__m128 x) {
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    x = _mm_max_ss(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(x);
}

static inline __m128i attn_load32(const void * p) {
    int32_t i;
    memcpy(&i, p, sizeof(i));
    return _mm_cvtsi32_si128(i);
}

#if defined(__AVX512F__)

#define ATTN_ND 2

static inline attn_vec attn_max(attn_vec a, attn_vec b) { return _mm512_max_ps(a, b); }
static inline float    attn_hmax(attn_vec x)            { return _mm512_reduce_max_ps(x); }

static inline void attn_sum4(attn_vec a, attn_vec b, attn_vec c, attn_vec d, float * out) {
    a = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    c = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    a = _mm512_add_ps(_mm512_shuffle_ps(a, c, _MM_SHUFFLE(1, 0, 1, 0)), _mm512_shuffle_ps(a, c, _MM_SHUFFLE(3, 2, 3, 2)));
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

static inline attn_vec attn_load_f16(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

static inline attn_vec attn_set1_f16(ggml_fp16_t x) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((short) x));
}

static inline attn_vec attn_load_bf16(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}

static inline attn_vec attn_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

static inline attn_vec attn_load_u4(const uint8_t * p, bool upper) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    const __m128i y = _mm_and_si128(upper ? _mm_srli_epi16(x, 4) : x, _mm_set1_epi8(0x0F));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(y, _mm_set1_epi8(8))));
}

#elif defined(__AVX__)

#define ATTN_ND 4

static inline attn_vec attn_max(attn_vec a, attn_vec b) { return _mm256_max_ps(a, b); }
static inline float    attn_hmax(attn_vec x)            { return attn_hmax4(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1))); }

static inline void attn_sum4(attn_vec a, attn_vec b, attn_vec c, attn_vec d, float * out) {
    a = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    c = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    a = _mm256_add_ps(_mm256_shuffle_ps(a, c, _MM_SHUFFLE(1, 0, 1, 0)), _mm256_shuffle_ps(a, c, _MM_SHUFFLE(3, 2, 3, 2)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}

static inline attn_vec attn_load_f16(const ggml_fp16_t * p) {
    return GGML_F32Cx8_LOAD(p);
}

static inline attn_vec attn_set1_f16(ggml_fp16_t x) {
#if defined(__F16C__)
    return _mm256_cvtph_ps(_mm_set1_epi16((short) x));
#else
    return attn_set1(ATTN_FP16_TO_FP32(x));
#endif
}

// eight bytes as i32
static inline __m256i attn_widen(__m128i x) {
#if defined(__AVX2__)
    return _mm256_cvtepi8_epi32(x);
#else
    return _mm256_insertf128_si256(_mm256_castsi128_si256(_mm_cvtepi8_epi32(x)), _mm_cvtepi8_epi32(_mm_srli_si128(x, 4)), 1);
#endif
}

static inline attn_vec attn_load_bf16(const ggml_bf16_t * p) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    const __m128i z = _mm_setzero_si128();
    return _mm256_castsi256_ps(_mm256_insertf128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(z, x)), _mm_unpackhi_epi16(z, x), 1));
}

static inline attn_vec attn_load_i8(const int8_t * p) {
    return _mm256_cvtepi32_ps(attn_widen(_mm_loadl_epi64((const __m128i *) p)));
}

static inline attn_vec attn_load_u4(const uint8_t * p, bool upper) {
    const __m128i x = _mm_loadl_epi64((const __m128i *) p);
    const __m128i y = _mm_and_si128(upper ? _mm_srli_epi16(x, 4) : x, _mm_set1_epi8(0x0F));
    return _mm256_cvtepi32_ps(attn_widen(_mm_sub_epi8(y, _mm_set1_epi8(8))));
}

#else

#define ATTN_ND 4

static inline attn_vec attn_max(attn_vec a, attn_vec b) { return _mm_max_ps(a, b); }
static inline float    attn_hmax(attn_vec x)            { return attn_hmax4(x); }

static inline void attn_sum4(attn_vec a, attn_vec b, attn_vec c, attn_vec d, float * out) {
    a = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    c = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(a, c), _mm_movehl_ps(c, a)));
}

static inline attn_vec attn_load_f16(const ggml_fp16_t * p) {
    return _mm_setr_ps(ATTN_FP16_TO_FP32(p[0]), ATTN_FP16_TO_FP32(p[1]), ATTN_FP16_TO_FP32(p[2]), ATTN_FP16_TO_FP32(p[3]));
}

static inline attn_vec attn_set1_f16(ggml_fp16_t x) {
    return attn_set1(ATTN_FP16_TO_FP32(x));
}

static inline attn_vec attn_load_bf16(const ggml_bf16_t * p) {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *) p)));
}

static inline attn_vec attn_load_i8(const int8_t * p) {
    return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(attn_load32(p)));
}

static inline attn_vec attn_load_u4(const uint8_t * p, bool upper) {
    const __m128i x = attn_load32(p);
    const __m128i y = _mm_and_si128(upper ? _mm_srli_epi16(x, 4) : x, _mm_set1_epi8(0x0F));
    return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_sub_epi8(y, _mm_set1_epi8(8))));
}

#endif

#else // loops that compilers vectorize

#define ATTN_EPR 4
#define ATTN_ND  4

struct attn_vec { float v[ATTN_EPR]; };

#define ATTN_EACH(expr) attn_vec r; for (int i = 0; i < ATTN_EPR; ++i) { r.v[i] = (expr); } return r

static inline attn_vec attn_set1(float x)                           { ATTN_EACH(x); }
static inline attn_vec attn_zero()                                  { ATTN_EACH(0.0f); }
static inline attn_vec attn_load(const float * p)                   { ATTN_EACH(p[i]); }
static inline attn_vec attn_mul(attn_vec a, attn_vec b)             { ATTN_EACH(a.v[i] * b.v[i]); }
static inline attn_vec attn_max(attn_vec a, attn_vec b)             { ATTN_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline attn_vec attn_fma(attn_vec a, attn_vec b, attn_vec c) { ATTN_EACH(a.v[i] + b.v[i] * c.v[i]); }
static inline attn_vec attn_set1_f16(ggml_fp16_t x)                 { return attn_set1(ATTN_FP16_TO_FP32(x)); }
static inline attn_vec attn_load_f16(const ggml_fp16_t * p)         { ATTN_EACH(ATTN_FP16_TO_FP32(p[i])); }
static inline attn_vec attn_load_bf16(const ggml_bf16_t * p)        { ATTN_EACH(GGML_BF16_TO_FP32(p[i])); }
static inline attn_vec attn_load_i8(const int8_t * p)               { ATTN_EACH((float) p[i]); }
static inline attn_vec attn_load_u4(const uint8_t * p, bool upper)  { ATTN_EACH((float) ((upper ? p[i] >> 4 : p[i] & 0x0F) - 8)); }

#undef ATTN_EACH

static inline void attn_store(float * p, attn_vec x) {
    memcpy(p, x.v, sizeof(x.v));
}

static inline float attn_hmax(attn_vec x) {
    return MAX(MAX(x.v[0], x.v[1]), MAX(x.v[2], x.v[3]));
}

static inline float attn_hsum(attn_vec x) {
    return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
}

static inline void attn_sum4(attn_vec a, attn_vec b, attn_vec c, attn_vec d, float * out) {
    out[0] = attn_hsum(a);
    out[1] = attn_hsum(b);
    out[2] = attn_hsum(c);
    out[3] = attn_hsum(d);
}

#endif

// x[i] = exp(x[i] - max), their sum; n is a multiple of 16
static inline float attn_exp(int n, float * x, float max) {
#if defined(GGML_CPU_ATTN_SCALAR)
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        x[i] = expf(x[i] - max);
        sum += x[i];
    }
    return sum;
#elif defined(ATTN_HAS_EXP)
    const attn_vec m = attn_set1(-max);
    attn_vec sum = attn_zero();
    for (int i = 0; i < n; i += ATTN_EPR) {
        const attn_vec y = ggml_v_expf(attn_add(attn_load(x + i), m));
        attn_store(x + i, y);
        sum = attn_add(sum, y);
    }
    float out[4];
    attn_sum4(sum, sum, sum, sum, out);
    return out[0];
#else
    return (float) ggml_vec_soft_max_f32(n, x, x, max);
#endif
}

//
// rows of the cache
//

#define ATTN_QK    32 // elements of a block that may share a scale
#define ATTN_BLOCK 8  // most keys at a time: whole rows of them are read as a stream

// a row is a sequence of blocks of ATTN_QK elements, `size` bytes each
// load: elements [i, i + ATTN_EPR) of a block, without its scale
template <ggml_type T> struct attn_type;

template <> struct attn_type<GGML_TYPE_F32> {
    static constexpr size_t size      = ATTN_QK*sizeof(float);
    static constexpr bool   has_scale = false;

    static attn_vec scale(const char *)         { return attn_set1(1.0f); }
    static attn_vec load(const char * x, int i) { return attn_load((const float *) x + i); }
};

template <> struct attn_type<GGML_TYPE_F16> {
    static constexpr size_t size      = ATTN_QK*sizeof(ggml_fp16_t);
    static constexpr bool   has_scale = false;

    static attn_vec scale(const char *)         { return attn_set1(1.0f); }
    static attn_vec load(const char * x, int i) { return attn_load_f16((const ggml_fp16_t *) x + i); }
};

template <> struct attn_type<GGML_TYPE_BF16> {
    static constexpr size_t size      = ATTN_QK*sizeof(ggml_bf16_t);
    static constexpr bool   has_scale = false;

    static attn_vec scale(const char *)         { return attn_set1(1.0f); }
    static attn_vec load(const char * x, int i) { return attn_load_bf16((const ggml_bf16_t *) x + i); }
};

template <> struct attn_type<GGML_TYPE_Q8_0> {
    static constexpr size_t size      = sizeof(block_q8_0);
    static constexpr bool   has_scale = true;

    static attn_vec scale(const char * x)       { return attn_set1_f16(((const block_q8_0 *) x)->d); }
    static attn_vec load(const char * x, int i) { return attn_load_i8(((const block_q8_0 *) x)->qs + i); }
};

template <> struct attn_type<GGML_TYPE_Q4_0> {
    static constexpr size_t size      = sizeof(block_q4_0);
    static constexpr bool   has_scale = true;

    static attn_vec scale(const char * x)       { return attn_set1_f16(((const block_q4_0 *) x)->d); }
    static attn_vec load(const char * x, int i) { return attn_load_u4(((const block_q4_0 *) x)->qs + i % (QK4_0/2), i >= QK4_0/2); }
};

static_assert(QK8_0 == ATTN_QK && QK4_0 == ATTN_QK, "blocks of 32");

//
// products
//

// s[r*lds + j] = q[r] . k[j], for NR query rows and NK keys; k[j]: rows of the cache, at an offset
template <ggml_type T, int NR, int NK> static inline void attn_dot(const float * const * q, const char * const * k, size_t off, int d, float * s, int lds) {
    attn_vec acc[NR*NK];

    for (int i = 0; i < NR*NK; ++i) {
        acc[i] = attn_zero();
    }

    for (int ib = 0; ib < d; ib += ATTN_QK, off += attn_type<T>::size) {
        attn_vec scale[NK];
        if (attn_type<T>::has_scale) {
            for (int j = 0; j < NK; ++j) {
                scale[j] = attn_type<T>::scale(k[j] + off);
            }
        }
        for (int i = 0; i < ATTN_QK; i += ATTN_EPR) {
            attn_vec x[NR];
            for (int r = 0; r < NR; ++r) {
                x[r] = attn_load(q[r] + ib + i);
            }
            for (int j = 0; j < NK; ++j) {
                attn_vec y = attn_type<T>::load(k[j] + off, i);
                if (attn_type<T>::has_scale) {
                    y = attn_mul(y, scale[j]);
                }
                for (int r = 0; r < NR; ++r) {
                    acc[r*NK + j] = attn_fma(acc[r*NK + j], x[r], y);
                }
            }
        }
    }

    float sum[GGML_PAD(NR*NK, 4)];

    for (int i = 0; i < NR*NK; i += 4) {
        attn_sum4(acc[i], i + 1 < NR*NK ? acc[i + 1] : attn_zero(), i + 2 < NR*NK ? acc[i + 2] : attn_zero(), i + 3 < NR*NK ? acc[i + 3] : attn_zero(), sum + i);
    }
    for (int i = 0; i < NR*NK; ++i) {
        s[i/NK*lds + i%NK] = sum[i];
    }
}

// o[r] = o[r]*c[r] + sum of p[r*ldp + j]*v[j] over n keys, for NR query rows; v[j]: rows of the cache, at an offset
template <ggml_type T, int NR, int ND> static inline void attn_mad(float * const * o, const float * c, const float * p, int ldp, const char * const * v, size_t off, int n, int d) {
    for (int ib = 0; ib < d; ib += ATTN_QK, off += attn_type<T>::size) {
        for (int i = 0; i < ATTN_QK; i += ND*ATTN_EPR) {
            attn_vec acc[NR][ND];

            for (int r = 0; r < NR; ++r) {
                for (int k = 0; k < ND; ++k) {
                    acc[r][k] = attn_zero();
                }
            }

            for (int j = 0; j < n; ++j) {
                const char * x = v[j] + off;

                // the scale goes to whatever is less
                attn_vec scale;
                if (attn_type<T>::has_scale) {
                    scale = attn_type<T>::scale(x);
                }

                if (NR <= ND) {
                    attn_vec w[NR];
                    for (int r = 0; r < NR; ++r) {
                        w[r] = attn_set1(p[r*ldp + j]);
                        if (attn_type<T>::has_scale) {
                            w[r] = attn_mul(w[r], scale);
                        }
                    }
                    for (int k = 0; k < ND; ++k) {
                        const attn_vec y = attn_type<T>::load(x, i + k*ATTN_EPR);
                        for (int r = 0; r < NR; ++r) {
                            acc[r][k] = attn_fma(acc[r][k], w[r], y);
                        }
                    }
                } else {
                    attn_vec y[ND];
                    for (int k = 0; k < ND; ++k) {
                        y[k] = attn_type<T>::load(x, i + k*ATTN_EPR);
                        if (attn_type<T>::has_scale) {
                            y[k] = attn_mul(y[k], scale);
                        }
                    }
                    for (int r = 0; r < NR; ++r) {
                        const attn_vec w = attn_set1(p[r*ldp + j]);
                        for (int k = 0; k < ND; ++k) {
                            acc[r][k] = attn_fma(acc[r][k], w, y[k]);
                        }
                    }
                }
            }

            for (int r = 0; r < NR; ++r) {
                const attn_vec w = attn_set1(c[r]);
                float * out = o[r] + ib + i;
                for (int k = 0; k < ND; ++k) {
                    attn_store(out + k*ATTN_EPR, attn_fma(acc[r][k], attn_load(out + k*ATTN_EPR), w));
                }
            }
        }
    }
}

// n query rows, n_k keys
typedef void (* attn_dot_t)(const float * const * q, int n, const char * const * k, size_t off, int n_k, int d, float * s, int lds);
typedef void (* attn_mad_t)(float * const * o, int n, const float * c, const float * p, int ldp, const char * const * v, size_t off, int n_v, int d);

template <ggml_type T, int NR, int NK> static inline void attn_dot_keys(const float * const * q, const char * const * k, size_t off, int n_k, int d, float * s, int lds) {
    int j = 0;
    for (; j + NK <= n_k; j += NK) {
        attn_dot<T, NR, NK>(q, k + j, off, d, s + j, lds);
    }
    for (; NK > 1 && j < n_k; ++j) {
        attn_dot<T, NR, 1>(q, k + j, off, d, s + j, lds);
    }
}

// query rows that go together, of n left: as many as the registers hold
static inline int attn_n_rows(int n) {
    return n <= 4 ? n : n < 8 ? (n + 1)/2 : 4;
}

template <ggml_type T> static void attn_dot_rows(const float * const * q, int n, const char * const * k, size_t off, int n_k, int d, float * s, int lds) {
    for (int r = 0, nr; r < n; r += nr) {
        nr = attn_n_rows(n - r);
        switch (nr) {
            case 1: attn_dot_keys<T, 1, 4>(q + r, k, off, n_k, d, s + r*lds, lds); break;
            case 2: attn_dot_keys<T, 2, 4>(q + r, k, off, n_k, d, s + r*lds, lds); break;
            case 3: attn_dot_keys<T, 3, 2>(q + r, k, off, n_k, d, s + r*lds, lds); break;
            case 4: attn_dot_keys<T, 4, 2>(q + r, k, off, n_k, d, s + r*lds, lds); break;
        }
    }
}

template <ggml_type T> static void attn_mad_rows(float * const * o, int n, const float * c, const float * p, int ldp, const char * const * v, size_t off, int n_v, int d) {
    for (int r = 0, nr; r < n; r += nr) {
        nr = attn_n_rows(n - r);
        switch (nr) {
            case 1: attn_mad<T, 1, ATTN_ND>(o + r, c + r, p + r*ldp, ldp, v, off, n_v, d); break;
            case 2: attn_mad<T, 2, ATTN_ND>(o + r, c + r, p + r*ldp, ldp, v, off, n_v, d); break;
            case 3: attn_mad<T, 3, ATTN_ND>(o + r, c + r, p + r*ldp, ldp, v, off, n_v, d); break;
            case 4: attn_mad<T, 4, 2      >(o + r, c + r, p + r*ldp, ldp, v, off, n_v, d); break;
        }
    }
}

struct attn_ops {
    attn_dot_t dot;
    attn_mad_t mad;
};

// false: not a type of ours
static bool attn_ops_init(attn_ops & ops, ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  ops = { attn_dot_rows<GGML_TYPE_F32>,  attn_mad_rows<GGML_TYPE_F32>  }; return true;
        case GGML_TYPE_F16:  ops = { attn_dot_rows<GGML_TYPE_F16>,  attn_mad_rows<GGML_TYPE_F16>  }; return true;
        case GGML_TYPE_BF16: ops = { attn_dot_rows<GGML_TYPE_BF16>, attn_mad_rows<GGML_TYPE_BF16> }; return true;
        case GGML_TYPE_Q8_0: ops = { attn_dot_rows<GGML_TYPE_Q8_0>, attn_mad_rows<GGML_TYPE_Q8_0> }; return true;
        case GGML_TYPE_Q4_0: ops = { attn_dot_rows<GGML_TYPE_Q4_0>, attn_mad_rows<GGML_TYPE_Q4_0> }; return true;
        default: return false;
    }
}
