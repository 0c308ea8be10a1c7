// the kernels of ggml-kv-score.h, in phases: between two of them all threads of a block wait for each other. A phase is a function of the
// thread's number and of what the block shares, so that a GPU runs it by threads and the CPU by loops

#pragma once

#include "ggml-kv-score.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define KV_SCORE_FN static __host__ __device__ __forceinline__
#else
#define KV_SCORE_FN static inline
#endif

struct kv_score_args {
    int n_layer, n_head_kv, group, n_stream, n_embd;
    int64_t n_kv;
    ggml_type type; // of the keys
    float scale, soft_cap;

    const char * q[GGML_KV_SCORE_LAYERS];
    const char * k[GGML_KV_SCORE_LAYERS];
    const char * sink[GGML_KV_SCORE_LAYERS_SINK]; // nullptr: none

    int64_t q_head, q_stream, k_row, k_head, k_stream, mask_stream, sums_head, sums_stream; // bytes

    const char * mask;
    bool  mask_f16;
    char * sums;

    // of the KV heads from i_first on; a KV head here is one of a layer and a stream
    int64_t i_first;
    float * logits; // [n_kv, group, KV heads]
    float * parts;  // [2, n_split, group, KV heads]: the largest logit, and the sum of what lies below it
    int     n_split;
    int64_t n_each;  // keys of a part
};

enum { KV_SCORE_THREADS = 128 };

struct kv_score_shared {
    alignas(16) float q[GGML_KV_SCORE_GROUP*GGML_KV_SCORE_HEAD];
    float red[GGML_KV_SCORE_GROUP][KV_SCORE_THREADS];
    float most[GGML_KV_SCORE_GROUP];
    float inverse[GGML_KV_SCORE_GROUP];
};

// a KV head of a layer and a stream
struct kv_score_place { int layer, head, stream; };

KV_SCORE_FN kv_score_place kv_score_of(const kv_score_args & a, int64_t i) {
    return { (int) (i/a.n_head_kv % a.n_layer), (int) (i % a.n_head_kv), (int) (i/a.n_head_kv/a.n_layer) };
}

KV_SCORE_FN float kv_score_f16(const char * p) {
#if defined(__CUDACC__)
    return __half2float(*(const __half *) p);
#else
    return ggml_fp16_to_fp32(*(const ggml_fp16_t *) p);
#endif
}

// eight neighbours of a row
KV_SCORE_FN void kv_score_load(const char * row, int c, ggml_type type, float * x) {
    if (type == GGML_TYPE_F32) {
        for (int i = 0; i < 8; ++i) {
            x[i] = ((const float *) row)[c + i];
        }
    } else if (type == GGML_TYPE_F16) {
#if defined(__CUDA_ARCH__)
        const uint4 bits = *(const uint4 *) (row + 2*c);
        const __half2 * pairs = (const __half2 *) &bits;
        for (int i = 0; i < 4; ++i) {
            const float2 both = __half22float2(pairs[i]);
            x[2*i + 0] = both.x;
            x[2*i + 1] = both.y;
        }
#else
        for (int i = 0; i < 8; ++i) {
            x[i] = kv_score_f16(row + 2*(c + i));
        }
#endif
    } else { // q8_0: 32 values behind their scale
        const char * block = row + c/32*34;
        const float  d     = kv_score_f16(block);
        for (int i = 0; i < 8; ++i) {
            x[i] = d*(float) ((const int8_t *) (block + 2))[c % 32 + i];
        }
    }
}

// exp(-inf) is 0, also where nothing is above it
KV_SCORE_FN float kv_score_exp(float x, float most) {
    return most == -INFINITY ? 0.0f : expf(x - most);
}

KV_SCORE_FN float kv_score_max(float a, float b) {
    return a > b ? a : b;
}

//
// weights: a block for each part of the keys of a KV head
//

KV_SCORE_FN void kv_score_read_queries(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i) {
    const kv_score_place at = kv_score_of(a, i);

    const float scale = a.soft_cap > 0.0f ? a.scale/a.soft_cap : a.scale;

    for (int j = tid; j < a.group*a.n_embd; j += KV_SCORE_THREADS) {
        const char * q = a.q[at.layer] + at.stream*a.q_stream + (at.head*a.group + j/a.n_embd)*a.q_head;
        s.q[j] = scale*((const float *) q)[j % a.n_embd];
    }
}

// G: the group, or more
template <ggml_type TYPE, int G>
KV_SCORE_FN void kv_score_logits(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i, int split) {
    const kv_score_place at = kv_score_of(a, i);

    const char * k    = a.k[at.layer] + at.stream*a.k_stream + at.head*a.k_head;
    const char * mask = a.mask + at.stream*a.mask_stream;
    float * logits = a.logits + (i - a.i_first)*a.group*a.n_kv;

    const int64_t j1 = (split + 1)*a.n_each < a.n_kv ? (split + 1)*a.n_each : a.n_kv;

    float most[G];
    for (int g = 0; g < G; ++g) {
        most[g] = -INFINITY;
    }

    for (int64_t j = split*a.n_each + tid; j < j1; j += KV_SCORE_THREADS) {
        const char * row = k + j*a.k_row;

        float acc[G] = {};
        for (int c = 0; c < a.n_embd; c += 8) {
            float x[8];
            kv_score_load(row, c, TYPE, x);
            for (int g = 0; g < G; ++g) {
                const float * q = s.q + (g < a.group ? g : 0)*a.n_embd + c;
                for (int e = 0; e < 8; ++e) {
                    acc[g] += q[e]*x[e];
                }
            }
        }

        const float bias = a.mask_f16 ? kv_score_f16(mask + 2*j) : ((const float *) mask)[j];

        for (int g = 0; g < G; ++g) {
            if (g < a.group) {
                // (a fast tanh has an error that a large cap would show)
                const float x = a.soft_cap > 0.0f ? a.soft_cap*(1.0f - 2.0f/(expf(2.0f*acc[g]) + 1.0f)) : acc[g];
                logits[g*a.n_kv + j] = x + bias;
                most[g] = kv_score_max(most[g], x + bias);
            }
        }
    }

    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
            s.red[g][tid] = most[g];
        }
    }
}

// over the threads, n at a time with the n behind them
KV_SCORE_FN void kv_score_reduce(const kv_score_args & a, kv_score_shared & s, int tid, int n, bool is_sum) {
    for (int g = 0; g < a.group && tid < n; ++g) {
        s.red[g][tid] = is_sum ? s.red[g][tid] + s.red[g][tid + n] : kv_score_max(s.red[g][tid], s.red[g][tid + n]);
    }
}

KV_SCORE_FN void kv_score_keep_most(const kv_score_args & a, kv_score_shared & s, int tid) {
    if (tid < a.group) {
        s.most[tid] = s.red[tid][0];
    }
}

KV_SCORE_FN void kv_score_sum(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i, int split) {
    const float * logits = a.logits + (i - a.i_first)*a.group*a.n_kv;

    const int64_t j1 = (split + 1)*a.n_each < a.n_kv ? (split + 1)*a.n_each : a.n_kv;

    for (int g = 0; g < a.group; ++g) {
        float sum = 0.0f;
        for (int64_t j = split*a.n_each + tid; j < j1; j += KV_SCORE_THREADS) {
            sum += kv_score_exp(logits[g*a.n_kv + j], s.most[g]);
        }
        s.red[g][tid] = sum;
    }
}

KV_SCORE_FN void kv_score_write_part(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i, int split) {
    if (tid < a.group) {
        float * part = a.parts + 2*(((i - a.i_first)*a.group + tid)*a.n_split + split);
        part[0] = s.most[tid];
        part[1] = s.red[tid][0];
    }
}

// then a block for each KV_SCORE_THREADS keys: of all parts, and the weights

KV_SCORE_FN void kv_score_join(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i) {
    if (tid >= a.group) {
        return;
    }
    const kv_score_place at = kv_score_of(a, i);

    const float * part = a.parts + 2*((i - a.i_first)*a.group + tid)*a.n_split;
    const float   sink = a.sink[0] ? ((const float *) a.sink[at.layer])[at.head*a.group + tid] : -INFINITY;

    float most = sink;
    for (int p = 0; p < a.n_split; ++p) {
        most = kv_score_max(most, part[2*p]);
    }
    float sum = kv_score_exp(sink, most);
    for (int p = 0; p < a.n_split; ++p) {
        sum += part[2*p + 1]*kv_score_exp(part[2*p], most);
    }
    s.most[tid]    = most;
    s.inverse[tid] = sum > 0.0f ? 1.0f/sum : 0.0f;
}

KV_SCORE_FN void kv_score_add(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i, int64_t i_block) {
    const int64_t j = i_block*KV_SCORE_THREADS + tid;
    if (j >= a.n_kv) {
        return;
    }
    const kv_score_place at = kv_score_of(a, i);

    const float * logits = a.logits + (i - a.i_first)*a.group*a.n_kv;
    float       * sum    = (float *) (a.sums + (at.layer*a.n_head_kv + at.head)*a.sums_head + at.stream*a.sums_stream) + j;

    float x = *sum;
    for (int g = 0; g < a.group; ++g) {
        x += s.inverse[g]*kv_score_exp(logits[g*a.n_kv + j], s.most[g]);
    }
    *sum = x;
}

//
// choice: a block for each unit
//

struct kv_choice_args {
    const char * worth;
    const char * factor;   // of the worth, or nullptr
    const char * birth;
    bool negative;
    int64_t head, stream; // bytes
    int64_t n_rows;
    int     n_unit, n_per;

    const float * clock;   // [n_stream]
    const float * row;     // [n_stream], of the history
    int32_t * victims;     // [n_unit, n_stream]
    float * history;       // [n_unit, ..]
    int64_t * rows;        // [n_unit, n_stream], or nullptr
};

struct kv_choice_shared {
    float   x    [KV_SCORE_THREADS];
    float   birth[KV_SCORE_THREADS];
    int32_t i    [KV_SCORE_THREADS];
};

KV_SCORE_FN bool kv_choice_is_above(float x, float birth, int32_t i, float x0, float birth0, int32_t i0) {
    return x != x0 ? x > x0 : birth != birth0 ? birth > birth0 : i < i0;
}

// rounded before it is added to anything, as where each has an operation of its own
KV_SCORE_FN float kv_choice_product(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(x, y);
#else
    volatile float res = x*y;
    return res;
#endif
}

KV_SCORE_FN void kv_choice_scan(const kv_choice_args & a, kv_choice_shared & s, int tid, int unit, int stream) {
    const char * worth = a.worth + stream*a.stream + (int64_t) unit*a.n_per*a.head;
    const char * birth = a.birth + stream*a.stream + (int64_t) unit*a.n_per*a.head;
    const char * factor = a.factor ? a.factor + stream*a.stream + (int64_t) unit*a.n_per*a.head : nullptr;

    const float clock = a.clock[stream];

    float   best_x     = -INFINITY;
    float   best_birth = -INFINITY;
    int32_t best       = 0;

    for (int64_t j = tid; j < a.n_rows; j += KV_SCORE_THREADS) {
        float w = 0.0f;
        for (int h = 0; h < a.n_per; ++h) {
            float part = ((const float *) (worth + h*a.head))[j];
            if (factor) {
                part = kv_choice_product(part, ((const float *) (factor + h*a.head))[j]);
            }
            w = h == 0 ? part : w + part;
        }
        w = a.negative ? -w : w;
        w = w < GGML_KV_SCORE_MOST ? w : GGML_KV_SCORE_MOST; // a number of anything
        w = w > -GGML_KV_SCORE_MOST ? w : -GGML_KV_SCORE_MOST;

        // 0 for candidates, below it for all others
        const float b    = ((const float *) birth)[j];
        const float late = b + clock < 0.0f ? b + clock : 0.0f;
        const float x    = (late > -FLT_MAX ? late : -FLT_MAX) - w;

        if (kv_choice_is_above(x, b, (int32_t) j, best_x, best_birth, best)) {
            best_x     = x;
            best_birth = b;
            best       = (int32_t) j;
        }
    }
    s.x    [tid] = best_x;
    s.birth[tid] = best_birth;
    s.i    [tid] = best;
}

KV_SCORE_FN void kv_choice_reduce(kv_choice_shared & s, int tid, int n) {
    if (tid < n && kv_choice_is_above(s.x[tid + n], s.birth[tid + n], s.i[tid + n], s.x[tid], s.birth[tid], s.i[tid])) {
        s.x    [tid] = s.x    [tid + n];
        s.birth[tid] = s.birth[tid + n];
        s.i    [tid] = s.i    [tid + n];
    }
}

KV_SCORE_FN void kv_choice_write(const kv_choice_args & a, kv_choice_shared & s, int tid, int unit, int stream) {
    if (tid == 0) {
        a.victims[(int64_t) stream*a.n_unit + unit] = s.i[0];
        a.history[(int64_t) a.row[stream]*a.n_unit + unit] = (float) s.i[0];
        if (a.rows) {
            a.rows[(int64_t) stream*a.n_unit + unit] = s.i[0];
        }
    }
}

//
// what the tensors say
//

static inline ggml_tensor * const * kv_score_keys_of(const ggml_tensor * dst) {
    ggml_tensor * const * res;
    memcpy(&res, &dst->op_params[GGML_KV_SCORE_PARAM_KEYS], sizeof(res));

    return res;
}

static inline kv_score_args kv_score_args_of(const ggml_tensor * dst) {
    ggml_tensor * const * keys = kv_score_keys_of(dst);

    kv_score_args a = {};

    a.n_layer = dst->op_params[GGML_KV_SCORE_PARAM_N_LAYER];

    const ggml_tensor * q    = dst->src[1];
    const ggml_tensor * mask = dst->src[1 + a.n_layer];
    const int64_t       s0   = dst->op_params[GGML_KV_SCORE_PARAM_STREAM];

    a.n_kv      = dst->ne[0];
    a.n_head_kv = (int) (dst->ne[1]/a.n_layer);
    a.n_stream  = (int) dst->ne[2];
    a.group     = (int) (q->ne[2]/a.n_head_kv);
    a.n_embd    = (int) q->ne[0];
    a.type      = keys[0]->type;
    a.scale     = ((const float *) dst->op_params)[GGML_KV_SCORE_PARAM_SCALE];
    a.soft_cap  = ((const float *) dst->op_params)[GGML_KV_SCORE_PARAM_SOFT_CAP];

    for (int i = 0; i < a.n_layer; ++i) {
        a.q[i] = (const char *) dst->src[1 + i]->data;
        a.k[i] = (const char *) keys[i]->data + s0*keys[i]->nb[2];
        if (dst->op_params[GGML_KV_SCORE_PARAM_HAS_SINK]) {
            a.sink[i] = (const char *) dst->src[2 + a.n_layer + i]->data;
        }
    }
    a.q_head   = q->nb[2];
    a.q_stream = q->nb[3];
    a.k_row    = keys[0]->nb[1];
    a.k_head   = ggml_row_size(keys[0]->type, a.n_embd);
    a.k_stream = keys[0]->nb[2];

    a.mask        = (const char *) mask->data;
    a.mask_f16    = mask->type == GGML_TYPE_F16;
    a.mask_stream = mask->ne[3] > 1 ? mask->nb[3] : 0;

    a.sums        = (char *) dst->data;
    a.sums_head   = dst->nb[1];
    a.sums_stream = dst->nb[2];

    return a;
}

static inline kv_choice_args kv_choice_args_of(const ggml_tensor * dst) {
    const ggml_tensor * planes  = dst->src[1];
    const ggml_tensor * now     = dst->src[2];
    const ggml_tensor * history = dst->src[3];

    const int64_t s0       = dst->op_params[GGML_KV_SCORE_PARAM_STREAM];
    const int64_t n_stream = dst->op_params[GGML_KV_SCORE_PARAM_N_STREAM];

    kv_choice_args a = {};

    a.n_rows = planes->ne[0];
    a.n_per  = dst->op_params[GGML_KV_SCORE_PARAM_N_PER];
    a.n_unit = (int) (planes->ne[1]/a.n_per);
    a.head   = planes->nb[1];
    a.stream = planes->nb[2];
    a.worth  = (const char *) planes->data + s0*planes->nb[2];
    a.birth  = a.worth + dst->op_params[GGML_KV_SCORE_PARAM_BIRTH]*n_stream*planes->nb[2];
    a.factor = dst->op_params[GGML_KV_SCORE_PARAM_BIRTH] > 1 ? a.worth + n_stream*planes->nb[2] : nullptr;
    a.negative = dst->op_params[GGML_KV_SCORE_PARAM_NEGATIVE] != 0;

    a.row     = (const float *) now->data + s0;
    a.clock   = (const float *) now->data + dst->op_params[GGML_KV_SCORE_PARAM_CLOCK] + s0;
    a.victims = (int32_t *) dst->data;
    a.history = (float *) history->data;
    a.rows    = dst->src[4] ? (int64_t *) dst->src[4]->data + s0*a.n_unit : nullptr;

    return a;
}

// shapes and types that the kernel covers
static inline bool kv_score_covers(const ggml_tensor * dst) {
    if (dst->op_params[GGML_KV_SCORE_PARAM_KIND] == GGML_KV_SCORE_CHOICE) {
        return true;
    }
    const kv_score_args a = kv_score_args_of(dst);

    ggml_tensor * const * keys = kv_score_keys_of(dst);

    for (int i = 0; i < a.n_layer; ++i) {
        const ggml_tensor * q = dst->src[1 + i];
        const ggml_tensor * k = keys[i];

        if (!ggml_are_same_shape(q, dst->src[1]) || !ggml_are_same_stride(q, dst->src[1]) || !ggml_are_same_shape(k, keys[0]) || k->type != a.type) {
            return false;
        }
    }

    const ggml_tensor * q    = dst->src[1];
    const ggml_tensor * mask = dst->src[1 + a.n_layer];

    const bool is_covered = a.type == GGML_TYPE_F32 || (a.type == GGML_TYPE_F16 && a.k_row % 16 == 0) || (a.type == GGML_TYPE_Q8_0 && a.n_embd % 32 == 0);

    return is_covered && a.n_embd % 8 == 0 && a.n_embd <= GGML_KV_SCORE_HEAD && a.group >= 1 && a.group <= GGML_KV_SCORE_GROUP && q->ne[1] == 1 &&
        q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && (mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
}
