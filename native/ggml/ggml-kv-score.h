// two marked GGML_OP_CUSTOM nodes for caches whose victims are chosen where they lie: the attention weights of one token in several
// layers, and the next victims. A device that knows them runs a kernel; the CPU runs the same kernel's code, thread after thread

#pragma once

#include "ggml.h"

#include <stdint.h>

// op_params behind those of ggml_custom_inplace()
enum {
    GGML_KV_SCORE_PARAM_KIND     = 6,  // i32: ggml_kv_score_kind
    GGML_KV_SCORE_PARAM_STREAM   = 7,  // i32: the first one of keys, planes and `now`

    GGML_KV_SCORE_PARAM_N_LAYER  = 8,  // weights, i32: layers
    GGML_KV_SCORE_PARAM_SCALE    = 9,  // weights, f32
    GGML_KV_SCORE_PARAM_SOFT_CAP = 10, // weights, f32: 0 = none
    GGML_KV_SCORE_PARAM_HAS_SINK = 11, // weights, i32
    GGML_KV_SCORE_PARAM_KEYS     = 12, // weights, ggml_tensor * const * [n_layer]: the keys of the layers, read when the node is run

    GGML_KV_SCORE_PARAM_N_PER    = 8,  // choice, i32: heads of a unit
    GGML_KV_SCORE_PARAM_N_STREAM = 9,  // choice, i32: of the planes
    GGML_KV_SCORE_PARAM_CLOCK    = 10, // choice, i32: where the clocks begin in `now`
    GGML_KV_SCORE_PARAM_BIRTH    = 11, // choice, i32: the kind that births are; before it one or two whose product is the worth
    GGML_KV_SCORE_PARAM_NEGATIVE = 12, // choice, i32: the largest product goes first
};

// what no other custom operation has there
enum ggml_kv_score_kind {
    GGML_KV_SCORE_WEIGHTS = 0x4b565357,
    GGML_KV_SCORE_CHOICE  = 0x4b565343,
};

// most layers of a node: each has its query among the sources, and a head's attention sink as well where there are such
enum { GGML_KV_SCORE_LAYERS = 8, GGML_KV_SCORE_LAYERS_SINK = 4 };

enum { GGML_KV_SCORE_GROUP = 8, GGML_KV_SCORE_HEAD = 256 }; // most query heads on a KV head, and values of one

// a birth is -UNIT*(position - origin), exact in f32 for 2^24 positions: of two candidates the older one has the larger. Who is never a
// candidate has -FAR: protected tokens, and empty slots. A worth lies within +-MOST: a recent token is always further down than a candidate
#define GGML_KV_SCORE_UNIT 0x1p40f
#define GGML_KV_SCORE_FAR  0x1p100f
#define GGML_KV_SCORE_MOST 0x1p38f

#ifdef __cplusplus

// weights
//   dst:  the first source: a view of the sums, f32 [n_kv, n_head_kv*n_layer, n_stream]. The weights of the token's query are added
//   src:  n_layer queries, f32 [n_embd_head, 1, n_head, n_stream]; the mask, f16 or f32 [n_kv, .., n_stream];
//         n_layer times f32 [n_head], if there are attention sinks
//   keys: f32, f16 or q8_0 [n_embd_head*n_head_kv, n_rows, streams]
// choice
//   dst:  the first source: a view of the victims, i32 [n_unit*n_stream]. Of each unit the row with the least worth among its
//         candidates, of equals the oldest
//   src:  planes, f32 [n_rows, n_unit*n_per, kinds*streams]: what the worth is the product of, and birth; now, f32: per stream a row of the history, and from PARAM_CLOCK
//         on a clock; history, f32 [n_unit, ..]: written;
//         rows, i64 [n_unit, streams], or nullptr: written, as the victims

// whether a backend's kernel takes the node
typedef bool (*ggml_backend_kv_score_eligible_t)(const ggml_tensor * node);

static inline bool ggml_kv_score_is(const ggml_tensor * node) {
    return node->op == GGML_OP_CUSTOM &&
        (node->op_params[GGML_KV_SCORE_PARAM_KIND] == GGML_KV_SCORE_WEIGHTS || node->op_params[GGML_KV_SCORE_PARAM_KIND] == GGML_KV_SCORE_CHOICE);
}

#endif
