#include "ggml-cpu-attn.h"
#include "ggml-cpu-attn-rows.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>

// the keys are cut into ranges, which depend on the shape only, never on the number of threads. A unit of work is a range for the
// query heads of one KV head: maxima, sums and the weighted values of its rows. A second pass merges the ranges, in their order

static constexpr int     ATTN_TILE      = 64;  // keys
static constexpr size_t  ATTN_AHEAD     = 8192; // bytes of the cache
static constexpr int     ATTN_MAX_DIM   = 256;
static constexpr int     ATTN_MAX_Q     = 8;   // query tokens
static constexpr int     ATTN_MAX_Q_MANY = 16; // of several sequences
static constexpr int     ATTN_MAX_ROWS  = 64;  // query rows (tokens x heads of the group) of a unit
static constexpr int     ATTN_MAX_RANGE = 512; // keys
static constexpr int64_t ATTN_N_RANGES  = 16;
static constexpr int64_t ATTN_ALIGN     = 16;  // floats

// op params of ggml_flash_attn_ext
enum { ATTN_PARAM_SCALE = 0, ATTN_PARAM_MAX_BIAS = 1, ATTN_PARAM_SOFTCAP = 2 };

struct attn_shape {
    int64_t dk, dv;
    int64_t n_kv, n_q, n_head, n_head_kv, n_seq;

    int64_t group;   // query heads per KV head
    int64_t n_rows;  // query rows per KV head; row = token*group + head
    int64_t n_block; // blocks of them
    int64_t n_hb;    // KV heads of a unit
    int64_t n_hblock;
    int64_t n_tile;
    int64_t range;   // keys
    int64_t n_range;
    int64_t n_unit;

    attn_ops k_ops;
    attn_ops v_ops;

    int64_t span;  // query tokens of a sequence
    int64_t first; // first query token of each whose weights are written out; n_q: none

    // the work buffer, in floats
    int64_t n_part;    // per partial result: maximum, sum, and from ATTN_ALIGN on dv values
    int64_t o_part;    // [n_seq][n_range][n_head_kv][n_rows][n_part]: what a unit writes lies together
    int64_t o_prob;    // [n_seq][n_head_kv][n_rows][n_tile*ATTN_TILE], relative to the maximum at that tile
    int64_t o_max;     // [n_seq][n_head_kv][n_rows][n_tile] maxima
    int64_t o_scratch; // [n_threads][n_scratch]
    int64_t n_scratch;

    // its weights are written out
    bool is_written(int64_t i_row) const { return i_row/group % span >= first; }

    int64_t row_index(int64_t i_seq, int64_t i_head_kv, int64_t i_row) const {
        return (i_seq*n_head_kv + i_head_kv)*n_rows + i_row;
    }

    // whole rows are read as a stream, if there is work for all threads. No result depends on it: heads with masks of their own do
    // not share a unit, since keys that no row of a unit sees are left out
    void split(int n_threads, bool own_masks) {
        const int64_t n_max = own_masks ? 1 : std::max<int64_t>(1, std::min(n_head_kv, ATTN_MAX_ROWS/n_rows));

        for (n_hb = n_max; ; --n_hb) {
            n_hblock = (n_head_kv + n_hb - 1)/n_hb;
            n_unit   = n_seq*n_range*n_block*n_hblock;

            if (n_hb == 1 || (n_unit + n_threads - 1)/n_threads*n_threads*7 <= n_unit*8) {
                break;
            }
        }
    }

    float * part(float * work, int64_t i_seq, int64_t i_range, int64_t i_head_kv, int64_t i_row) const {
        return work + o_part + (((i_seq*n_range + i_range)*n_head_kv + i_head_kv)*n_rows + i_row)*n_part;
    }

    size_t work_size(int n_threads) const {
        return (o_scratch + n_threads*n_scratch + ATTN_ALIGN)*sizeof(float);
    }
};

static bool attn_dim_ok(int64_t d) {
    return d > 0 && d <= ATTN_MAX_DIM && d % 32 == 0;
}

// tests: nodes that nobody has marked, such as those of test-backend-ops
static bool attn_all() {
    static const bool res = getenv("GGML_CPU_ATTN_ALL") != nullptr;

    return res;
}

static bool attn_shape_init(attn_shape & s, const ggml_tensor * dst) {
    const int32_t mode = ggml_get_op_params_i32(dst, GGML_CPU_ATTN_PARAM_MODE);

    if (dst->op != GGML_OP_FLASH_ATTN_EXT || (mode != GGML_CPU_ATTN_ON && mode != GGML_CPU_ATTN_MANY && !attn_all())) {
        return false;
    }

    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * v      = dst->src[2];
    const ggml_tensor * mask   = dst->src[3];
    const ggml_tensor * scores = dst->src[GGML_CPU_ATTN_SRC_SCORES];

    s.dk        = k->ne[0];
    s.dv        = v->ne[0];
    s.n_kv      = k->ne[1];
    s.n_q       = q->ne[1];
    s.n_head    = q->ne[2];
    s.n_head_kv = k->ne[2];
    s.n_seq     = q->ne[3];

    if (!attn_ops_init(s.k_ops, k->type) || !attn_ops_init(s.v_ops, v->type) || !attn_dim_ok(s.dk) || !attn_dim_ok(s.dv) || s.n_q > (mode == GGML_CPU_ATTN_MANY ? ATTN_MAX_Q_MANY : ATTN_MAX_Q) || ggml_nelements(dst) == 0 || s.n_kv == 0) {
        return false;
    }

    if (q->ne[0] != s.dk || v->ne[1] != s.n_kv || v->ne[2] != s.n_head_kv || k->ne[3] != s.n_seq || v->ne[3] != s.n_seq || s.n_head % s.n_head_kv != 0) {
        return false;
    }

    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || k->nb[0] != ggml_type_size(k->type) || v->nb[0] != ggml_type_size(v->type) ||
        dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(dst)) {
        return false;
    }

    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->ne[0] < s.n_kv || mask->ne[1] < s.n_q)) {
        return false;
    }

    if (scores && (scores->type != GGML_TYPE_F32 || scores->nb[0] != sizeof(float) || scores->ne[0] < s.n_kv || scores->ne[1] != s.n_head_kv || scores->ne[2] != s.n_seq)) {
        return false;
    }

    s.group   = s.n_head/s.n_head_kv;
    s.n_rows  = s.n_q*s.group;
    s.n_block = (s.n_rows + ATTN_MAX_ROWS - 1)/ATTN_MAX_ROWS;
    s.n_tile  = (s.n_kv + ATTN_TILE - 1)/ATTN_TILE;

    s.range   = std::max<int64_t>(ATTN_TILE, std::min<int64_t>(ATTN_MAX_RANGE, GGML_PAD((s.n_kv + ATTN_N_RANGES - 1)/ATTN_N_RANGES, ATTN_TILE)));
    s.n_range = (s.n_kv + s.range - 1)/s.range;

    const int32_t span = ggml_get_op_params_i32(dst, GGML_CPU_ATTN_PARAM_SPAN);

    s.span  = span > 0 && span < s.n_q ? span : s.n_q;
    s.first = scores ? std::min<int64_t>(std::max(0, ggml_get_op_params_i32(dst, GGML_CPU_ATTN_PARAM_FIRST)), s.n_q) : s.n_q;

    const int64_t n_all  = s.n_seq*s.n_head_kv*s.n_rows;

    s.n_part    = GGML_PAD(ATTN_ALIGN + s.dv, ATTN_ALIGN);
    s.o_part    = 0;
    s.o_prob    = s.o_part + n_all*s.n_range*s.n_part;
    s.o_max     = s.o_prob + (scores ? n_all*s.n_tile*ATTN_TILE : 0);
    s.o_scratch = s.o_max  + (scores ? GGML_PAD(n_all*s.n_tile, ATTN_ALIGN) : 0);
    // logits and masks of a unit; then, for the weights, maximum and sum of each row: a group may have more rows than a unit
    s.n_scratch = std::max<int64_t>(2*ATTN_MAX_ROWS*ATTN_TILE, GGML_PAD(2*s.n_rows, ATTN_ALIGN));

    return true;
}

// what threads share, but for the shape
struct attn_args {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;

    float scale;
    float max_bias;
    float softcap;
    float m0, m1;
    int64_t n_head_log2;

    float * work;

    float slope(int64_t h) const {
        return max_bias > 0.0f ? (h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_head_log2) + 1)) : 1.0f;
    }
};

// mask of a tile as f32, without the keys that no row sees
struct attn_mask {
    int     n;             // keys that are left
    bool    all;           // none was left out
    bool    zero;          // nothing to add
    uint8_t idx[ATTN_TILE];
};

// masks: [n_mask] rows of f16 at the tile's first key; out: [n_mask][ATTN_TILE]
static void attn_mask_init(attn_mask & m, const ggml_fp16_t * const * masks, int n_mask, int n, float * out) {
    uint8_t live[ATTN_TILE] = {0};
    uint16_t some = 0;

    for (int i = 0; i < n_mask; ++i) {
        for (int j = 0; j < n; ++j) {
            live[j] |= masks[i][j] != 0xFC00; // -INFINITY
            some    |= masks[i][j];
        }
    }

    m.n    = n;
    m.all  = true;
    m.zero = some == 0;

    if (m.zero) {
        return;
    }

    m.n = 0;
    for (int j = 0; j < n; ++j) {
        m.idx[m.n] = (uint8_t) j;
        m.n += live[j];
    }
    m.all = m.n == n;

    for (int i = 0; i < n_mask; ++i) {
        float * o = out + i*ATTN_TILE;
        for (int j = 0; j < m.n; ++j) {
            o[j] = ATTN_FP16_TO_FP32(masks[i][m.idx[j]]);
        }
        for (int j = m.n; j < GGML_PAD(m.n, 16); ++j) {
            o[j] = 0.0f;
        }
    }
}

// any of n keys is seen; a loop that compilers vectorize
static bool attn_mask_any(const ggml_fp16_t * mask, int n) {
    uint16_t some = 0;
    for (int j = 0; j < n; ++j) {
        some |= mask[j] ^ 0xFC00; // -INFINITY
    }
    return some != 0;
}

// logits from products: s [n], padded to a multiple of 16 with -INFINITY; returns the largest
static float attn_logits(float * s, int n, const attn_args & a, const float * mask, float slope) {
    const attn_vec scale = attn_set1(a.scale);

    attn_vec max = attn_set1(-INFINITY);

    // what is behind the end does not count
    for (int i = n; i < GGML_PAD(n, 16); ++i) {
        s[i] = -INFINITY;
    }

    if (a.softcap != 0.0f) {
        for (int i = 0; i < n; ++i) {
            s[i] = a.softcap*tanhf(s[i]*a.scale) + (mask ? slope*mask[i] : 0.0f);
        }
        for (int i = 0; i < n; i += ATTN_EPR) {
            max = attn_max(max, attn_load(s + i));
        }
    } else if (mask) {
        const attn_vec x = attn_set1(slope);
        for (int i = 0; i < n; i += ATTN_EPR) {
            const attn_vec y = attn_fma(attn_mul(attn_load(s + i), scale), attn_load(mask + i), x);
            attn_store(s + i, y);
            max = attn_max(max, y);
        }
    } else {
        for (int i = 0; i < n; i += ATTN_EPR) {
            const attn_vec y = attn_mul(attn_load(s + i), scale);
            attn_store(s + i, y);
            max = attn_max(max, y);
        }
    }

    return attn_hmax(max);
}

// fetches rows of the cache, ATTN_AHEAD bytes before they are needed: a block that is computed in between breaks the stream that the
// processor would see
struct attn_ahead {
    const char * row;
    size_t nb;
    int n_line; // cache lines of a row
    int line;
    int step;   // of them at a time

    void init(const char * x, size_t nb_row, size_t size, int n_head) {
        nb     = nb_row;
        n_line = (int) ((size + 63)/64);
        line   = 0;
        step   = (ATTN_BLOCK*n_line + n_head - 1)/n_head;
        row    = x + std::max<size_t>(1, ATTN_AHEAD/size)*nb;
    }

    void fetch() {
        for (int i = 0; i < step; ++i) {
            ATTN_PREFETCH(row + 64*line);
            if (++line == n_line) {
                line = 0;
                row += nb;
            }
        }
    }
};

static void attn_unit(const attn_shape & s, const attn_args & a, int64_t unit, float * scratch) {
    // the heads of a range follow each other: their rows share pages
    const int64_t i_hblock = unit % s.n_hblock;
    const int64_t i_block  = unit/s.n_hblock % s.n_block;
    const int64_t i_range  = unit/(s.n_hblock*s.n_block) % s.n_range;
    const int64_t i_seq    = unit/(s.n_hblock*s.n_block*s.n_range);

    const int64_t head0  = i_hblock*s.n_hb;
    const int     n_head = (int) std::min(s.n_hb, s.n_head_kv - head0);
    const int64_t row0   = i_block*ATTN_MAX_ROWS;
    const int     n_rows = (int) std::min<int64_t>(ATTN_MAX_ROWS, s.n_rows - row0);
    const int     n      = n_head*n_rows; // [n_head][n_rows]

    const int64_t kv0 = i_range*s.range;
    const int64_t kv1 = std::min(kv0 + s.range, s.n_kv);

    const char * k_data = (const char *) a.k->data + head0*a.k->nb[2] + i_seq*a.k->nb[3];
    const char * v_data = (const char *) a.v->data + head0*a.v->nb[2] + i_seq*a.v->nb[3];

    const int dk = (int) s.dk;
    const int dv = (int) s.dv;

    const size_t k_size = ggml_row_size(a.k->type, n_head*dk);
    const size_t v_size = ggml_row_size(a.v->type, n_head*dv);

    float * logits = scratch;              // [n][ATTN_TILE]
    float * mask32 = logits + n*ATTN_TILE; // [n_mask][ATTN_TILE]

    const float * q   [ATTN_MAX_ROWS];
    float *       o   [ATTN_MAX_ROWS];
    int64_t       idx [ATTN_MAX_ROWS];
    float         M   [ATTN_MAX_ROWS];
    float         S   [ATTN_MAX_ROWS];
    float         corr[ATTN_MAX_ROWS];
    float         slope [ATTN_MAX_ROWS];
    uint8_t       i_mask[ATTN_MAX_ROWS]; // row of mask32

    const ggml_fp16_t * masks[ATTN_MAX_ROWS];
    int n_mask = 0;

    for (int r = 0; r < n; ++r) {
        const int64_t t = (row0 + r % n_rows)/s.group;
        const int64_t h = (row0 + r % n_rows)%s.group + (head0 + r/n_rows)*s.group;

        idx[r] = s.row_index(i_seq, head0 + r/n_rows, row0 + r % n_rows);
        q[r] = (const float *) ((const char *) a.q->data + t*a.q->nb[1] + h*a.q->nb[2] + i_seq*a.q->nb[3]);
        o[r] = s.part(a.work, i_seq, i_range, head0 + r/n_rows, row0 + r % n_rows) + ATTN_ALIGN;
        M[r] = -INFINITY;
        S[r] = 0.0f;
        memset(o[r], 0, s.dv*sizeof(float));

        i_mask[r] = 0;
        slope [r] = 1.0f;

        if (a.mask) {
            // the heads of a token mostly share it
            const ggml_fp16_t * m = (const ggml_fp16_t *) ((const char *) a.mask->data + t*a.mask->nb[1] + (h % a.mask->ne[2])*a.mask->nb[2] + (i_seq % a.mask->ne[3])*a.mask->nb[3]);
            int i = 0;
            while (i < n_mask && masks[i] != m) {
                ++i;
            }
            if (i == n_mask) {
                masks[n_mask++] = m;
            }
            i_mask[r] = (uint8_t) i;
            slope [r] = a.slope(h);
        }
    }

    for (int64_t kv = kv0; kv < kv1; kv += ATTN_TILE) {
        const int     n_tile = (int) std::min<int64_t>(ATTN_TILE, kv1 - kv);
        const int64_t i_tile = kv/ATTN_TILE;

        attn_mask m;
        m.n    = n_tile;
        m.all  = true;
        m.zero = true;

        // a row that sees none of these keys is left out: of several sequences in one cache, all but one
        int i_live[ATTN_MAX_ROWS] = { 0 }; // of each mask its row of mask32, or -1

        if (a.mask) {
            const ggml_fp16_t * mt[ATTN_MAX_ROWS];
            int n_seen = 0;
            for (int i = 0; i < n_mask; ++i) {
                if (n_mask > 1 && !attn_mask_any(masks[i] + kv, n_tile)) {
                    i_live[i] = -1;
                    continue;
                }
                i_live[i]    = n_seen;
                mt[n_seen++] = masks[i] + kv;
            }
            m.n = 0;
            if (n_seen > 0) {
                attn_mask_init(m, mt, n_seen, n_tile, mask32);
            }
        }

        if (m.n == 0) {
            for (int r = 0; r < n; ++r) {
                if (s.is_written(row0 + r % n_rows)) {
                    a.work[s.o_max + idx[r]*s.n_tile + i_tile] = -INFINITY;
                }
            }
            continue;
        }

        int n_live = 0; // of a head
        int live[ATTN_MAX_ROWS];

        for (int x = 0; x < n_rows; ++x) {
            if (i_live[i_mask[x]] >= 0) {
                live[n_live++] = x;
            }
        }
        for (int r = 0; n_live < n_rows && r < n; ++r) {
            if (s.is_written(row0 + r % n_rows)) {
                a.work[s.o_max + idx[r]*s.n_tile + i_tile] = -INFINITY;
            }
        }

        const float * q_live[ATTN_MAX_ROWS]; // [n_head][n_live]
        float *       o_live[ATTN_MAX_ROWS];

        for (int y = 0; y < n_head*n_live; ++y) {
            const int r = y/n_live*n_rows + live[y % n_live];

            q_live[y] = q[r];
            o_live[y] = o[r];
        }

        const char * k_tile = k_data + kv*a.k->nb[1];
        const char * v_tile = v_data + kv*a.v->nb[1];

        const char * rows[ATTN_TILE];

        for (int j = 0; j < m.n; ++j) {
            rows[j] = k_tile + (m.all ? j : m.idx[j])*a.k->nb[1];
        }

        attn_ahead ahead;

        ahead.init(k_tile, a.k->nb[1], k_size, n_head);
        for (int j = 0; j < m.n; j += ATTN_BLOCK) {
            const int nb = std::min(ATTN_BLOCK, m.n - j);
            for (int h = 0; h < n_head; ++h) {
                ahead.fetch();
                s.k_ops.dot(q_live + h*n_live, n_live, rows + j, h*a.k->nb[2], nb, dk, logits + h*n_live*ATTN_TILE + j, ATTN_TILE);
            }
        }

        for (int y = 0; y < n_head*n_live; ++y) {
            const int r = y/n_live*n_rows + live[y % n_live];

            float * p = logits + y*ATTN_TILE;

            const float max = std::max(M[r], attn_logits(p, m.n, a, m.zero ? nullptr : mask32 + i_live[i_mask[r]]*ATTN_TILE, slope[r]));

            if (max == -INFINITY) {
                memset(p, 0, m.n*sizeof(float));
                corr[y] = 1.0f;
            } else {
                corr[y] = max > M[r] ? expf(M[r] - max) : 1.0f;
                S[r] = S[r]*corr[y] + attn_exp(GGML_PAD(m.n, 16), p, max);
                M[r] = max;
            }

            if (s.is_written(row0 + r % n_rows)) {
                float * out = a.work + s.o_prob + (idx[r]*s.n_tile + i_tile)*ATTN_TILE;
                if (m.all) {
                    memcpy(out, p, m.n*sizeof(float));
                } else {
                    memset(out, 0, ATTN_TILE*sizeof(float));
                    for (int j = 0; j < m.n; ++j) {
                        out[m.idx[j]] = p[j];
                    }
                }
                a.work[s.o_max + idx[r]*s.n_tile + i_tile] = M[r];
            }
        }

        for (int j = 0; j < m.n; ++j) {
            rows[j] = v_tile + (m.all ? j : m.idx[j])*a.v->nb[1];
        }
        ahead.init(v_tile, a.v->nb[1], v_size, n_head);
        for (int j = 0; j < m.n; j += ATTN_BLOCK) {
            const int nb = std::min(ATTN_BLOCK, m.n - j);
            for (int h = 0; h < n_head; ++h) {
                ahead.fetch();
                s.v_ops.mad(o_live + h*n_live, n_live, corr + h*n_live, logits + h*n_live*ATTN_TILE + j, ATTN_TILE, rows + j, h*a.v->nb[2], nb, dv);
            }
            for (int y = 0; y < n_head*n_live && j == 0; ++y) {
                corr[y] = 1.0f;
            }
        }
    }

    for (int r = 0; r < n; ++r) {
        o[r][0 - ATTN_ALIGN] = M[r];
        o[r][1 - ATTN_ALIGN] = S[r];
    }
}

// maximum and sum of a row over all ranges
static void attn_stats(const attn_shape & s, const attn_args & a, const float * sinks, int64_t i_seq, int64_t i_head, int64_t row, float & M, float & S) {
    const float * part = s.part(a.work, i_seq, 0, i_head, row);
    const int64_t step = s.n_head_kv*s.n_rows*s.n_part;

    M = sinks ? sinks[i_head*s.group + row % s.group] : -INFINITY;
    for (int64_t i = 0; i < s.n_range; ++i) {
        M = std::max(M, part[i*step]);
    }

    S = sinks ? expf(sinks[i_head*s.group + row % s.group] - M) : 0.0f;
    for (int64_t i = 0; i < s.n_range; ++i) {
        if (part[i*step + 1] != 0.0f) {
            S += part[i*step + 1]*expf(part[i*step] - M);
        }
    }
}

static void attn_merge(const attn_shape & s, const attn_args & a, const float * sinks, int64_t i_seq, int64_t i_head, int64_t row, ggml_tensor * dst) {
    const float * part = s.part(a.work, i_seq, 0, i_head, row);

    const int64_t t = row/s.group;
    const int64_t h = row%s.group + i_head*s.group;

    float * out = (float *) ((char *) dst->data + h*dst->nb[1] + t*dst->nb[2] + i_seq*dst->nb[3]);

    float M, S;
    attn_stats(s, a, sinks, i_seq, i_head, row, M, S);

    // a row that sees no key is zero
    memset(out, 0, s.dv*sizeof(float));

    for (int64_t i = 0; i < s.n_range; ++i, part += s.n_head_kv*s.n_rows*s.n_part) {
        if (part[1] == 0.0f) {
            continue;
        }
        const float    * p = part + ATTN_ALIGN;
        const attn_vec   w = attn_set1(expf(part[0] - M)/S);
        for (int64_t j = 0; j < s.dv; j += ATTN_EPR) {
            attn_store(out + j, attn_fma(attn_load(out + j), attn_load(p + j), w));
        }
    }
}

// sums of the weights of a tile over the rows; M, S: [n_rows]
static void attn_scores(const attn_shape & s, const attn_args & a, float decay, int64_t i_seq, int64_t i_head, int64_t i_tile, const float * M, const float * S, ggml_tensor * dst) {
    float sum[ATTN_TILE] = {0.0f};

    for (int64_t r = 0; r < s.n_rows; ++r) {
        if (!s.is_written(r)) {
            continue;
        }
        const int64_t i = s.row_index(i_seq, i_head, r)*s.n_tile + i_tile;

        const float max = a.work[s.o_max + i];
        if (max == -INFINITY) {
            continue;
        }

        const float    * p = a.work + s.o_prob + i*ATTN_TILE;
        const attn_vec   w = attn_set1(expf(max - M[r])/S[r]*powf(decay, (float) (s.span - 1 - r/s.group % s.span)));
        for (int j = 0; j < ATTN_TILE; j += ATTN_EPR) {
            attn_store(sum + j, attn_fma(attn_load(sum + j), attn_load(p + j), w));
        }
    }

    const int64_t kv = i_tile*ATTN_TILE;
    memcpy((char *) dst->data + kv*sizeof(float) + i_head*dst->nb[1] + i_seq*dst->nb[2], sum, std::min<int64_t>(ATTN_TILE, s.n_kv - kv)*sizeof(float));
}

bool ggml_cpu_attn_eligible(const ggml_tensor * node) {
    attn_shape s;
    return attn_shape_init(s, node);
}

size_t ggml_cpu_attn_work_size(const ggml_tensor * node, int n_threads) {
    attn_shape s;
    return attn_shape_init(s, node) ? s.work_size(n_threads) : 0;
}

bool ggml_cpu_attn_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    attn_shape s;
    // whoever reads the weights finds them, also where the reference was asked for
    if ((params->use_ref && !dst->src[GGML_CPU_ATTN_SRC_SCORES] && !dst->src[GGML_CPU_ATTN_SRC_GATE]) || !attn_shape_init(s, dst) || params->wsize < s.work_size(params->nth)) {
        return false;
    }

    const int ith = params->ith;
    const int nth = params->nth;

    const ggml_tensor * gate = dst->src[GGML_CPU_ATTN_SRC_GATE];
    if (gate && *(const float *) gate->data == 0.0f) {
        if (ith == 0) {
            memset(dst->data, 0, ggml_nbytes(dst));
        }
        return true;
    }

    attn_args a;
    a.q    = dst->src[0];
    a.k    = dst->src[1];
    a.v    = dst->src[2];
    a.mask = dst->src[3];

    s.split(nth, a.mask && a.mask->ne[2] > 1);

    a.scale       = ggml_get_op_params_f32(dst, ATTN_PARAM_SCALE);
    a.max_bias    = ggml_get_op_params_f32(dst, ATTN_PARAM_MAX_BIAS);
    a.softcap     = ggml_get_op_params_f32(dst, ATTN_PARAM_SOFTCAP);
    a.n_head_log2 = 1u << (uint32_t) floor(log2((double) s.n_head));
    a.m0          = powf(2.0f, -(a.max_bias       )/a.n_head_log2);
    a.m1          = powf(2.0f, -(a.max_bias / 2.0f)/a.n_head_log2);
    a.work        = (float *) GGML_PAD((uintptr_t) params->wdata, ATTN_ALIGN*sizeof(float));

    if (a.softcap != 0.0f) {
        a.scale /= a.softcap;
    }

    float * scratch = a.work + s.o_scratch + ith*s.n_scratch;

    if (nth > 1) {
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);
    }

    for (int64_t i = ith; i < s.n_unit; i = nth > 1 ? ggml_threadpool_chunk_add(params->threadpool, 1) : i + 1) {
        attn_unit(s, a, i, scratch);
    }

    ggml_barrier(params->threadpool);

    const float * sinks = dst->src[4] ? (const float *) dst->src[4]->data : nullptr;

    const int64_t n_row = s.n_seq*s.n_head_kv*s.n_rows;
    for (int64_t i = ith*n_row/nth; i < (ith + 1)*n_row/nth; ++i) {
        attn_merge(s, a, sinks, i/(s.n_head_kv*s.n_rows), i/s.n_rows % s.n_head_kv, i % s.n_rows, dst);
    }

    ggml_tensor * scores = dst->src[GGML_CPU_ATTN_SRC_SCORES];
    if (!scores) {
        return true;
    }

    const float decay = ggml_get_op_params_f32(dst, GGML_CPU_ATTN_PARAM_DECAY);

    float * M = scratch;
    float * S = scratch + s.n_rows;

    const int64_t n_tile = s.n_seq*s.n_head_kv*s.n_tile;
    const int64_t tile0  = ith*n_tile/nth;
    const int64_t tile1  = (ith + 1)*n_tile/nth;

    for (int64_t i = tile0; i < tile1; ++i) {
        const int64_t i_seq  = i/(s.n_head_kv*s.n_tile);
        const int64_t i_head = i/s.n_tile % s.n_head_kv;

        if (i == tile0 || i % s.n_tile == 0) {
            for (int64_t r = 0; r < s.n_rows; ++r) {
                if (s.is_written(r)) {
                    attn_stats(s, a, sinks, i_seq, i_head, r, M[r], S[r]);
                }
            }
        }
        attn_scores(s, a, decay, i_seq, i_head, i % s.n_tile, M, S, scores);
    }

    return true;
}
