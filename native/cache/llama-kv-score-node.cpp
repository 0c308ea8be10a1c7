#include "llama-kv-score-node.h"

#include "ggml-kv-score-kernel.h"
#include "llama-kv-backend.h"

#include <algorithm>

static ggml_backend_kv_score_eligible_t get_eligible(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    return dev ? (ggml_backend_kv_score_eligible_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_kv_score_eligible") : nullptr;
}

bool llama_kv_has_score_node(ggml_backend_buffer_type_t buft) {
    if (llama_kv_is_cpu(buft)) {
        return llama_kv_env_is("LLAMA_KV_SCORES", "node");
    }
    return !llama_kv_env_is("LLAMA_KV_SCORES", "graph") && get_eligible(buft);
}

//
// the kernels, a block after the other
//

template <typename F>
static void for_threads(F && phase) {
    for (int tid = 0; tid < KV_SCORE_THREADS; ++tid) {
        phase(tid);
    }
}

using logits_t = void (*)(const kv_score_args & a, kv_score_shared & s, int tid, int64_t i, int split);

static logits_t logits_of(ggml_type type) {
    return type == GGML_TYPE_F32 ? kv_score_logits<GGML_TYPE_F32, GGML_KV_SCORE_GROUP> : type == GGML_TYPE_F16 ? kv_score_logits<GGML_TYPE_F16, GGML_KV_SCORE_GROUP> :
        kv_score_logits<GGML_TYPE_Q8_0, GGML_KV_SCORE_GROUP>;
}

static void reduce(const kv_score_args & a, kv_score_shared & s, bool is_sum) {
    for (int n = KV_SCORE_THREADS/2; n > 0; n /= 2) {
        for_threads([&](int tid) { kv_score_reduce(a, s, tid, n, is_sum); });
    }
}

static void op_weights(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    kv_score_args a = kv_score_args_of(dst);

    a.n_split = (int) std::min<int64_t>(3, (a.n_kv + KV_SCORE_THREADS - 1)/KV_SCORE_THREADS);
    a.n_each  = (a.n_kv + a.n_split - 1)/a.n_split;

    static thread_local std::vector<float> logits; // (of tests alone)
    static thread_local std::vector<float> parts;
    logits.resize(a.group*a.n_kv);
    parts.resize(2*a.group*a.n_split);
    a.logits = logits.data();
    a.parts  = parts.data();

    const logits_t find_logits = logits_of(a.type);

    kv_score_shared s;

    for (int64_t i = ith; i < (int64_t) a.n_head_kv*a.n_layer*a.n_stream; i += nth) {
        a.i_first = i;

        for (int split = 0; split < a.n_split; ++split) {
            for_threads([&](int tid) { kv_score_read_queries(a, s, tid, i); });
            for_threads([&](int tid) { find_logits(a, s, tid, i, split); });
            reduce(a, s, false);
            for_threads([&](int tid) { kv_score_keep_most(a, s, tid); });
            for_threads([&](int tid) { kv_score_sum(a, s, tid, i, split); });
            reduce(a, s, true);
            for_threads([&](int tid) { kv_score_write_part(a, s, tid, i, split); });
        }
        for (int64_t block = 0; block*KV_SCORE_THREADS < a.n_kv; ++block) {
            for_threads([&](int tid) { kv_score_join(a, s, tid, i); });
            for_threads([&](int tid) { kv_score_add(a, s, tid, i, block); });
        }
    }
}

static void op_choice(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const kv_choice_args a = kv_choice_args_of(dst);

    kv_choice_shared s;

    for (int64_t i = ith; i < dst->ne[0]; i += nth) {
        const int unit   = (int) (i % a.n_unit);
        const int stream = (int) (i/a.n_unit);

        for_threads([&](int tid) { kv_choice_scan(a, s, tid, unit, stream); });
        for (int n = KV_SCORE_THREADS/2; n > 0; n /= 2) {
            for_threads([&](int tid) { kv_choice_reduce(s, tid, n); });
        }
        for_threads([&](int tid) { kv_choice_write(a, s, tid, unit, stream); });
    }
}

//
// nodes
//

// an operation on its first source, in place; more sources than ggml_custom_inplace() takes
static ggml_tensor * node_of(ggml_context * ctx, ggml_tensor * dst, const std::vector<ggml_tensor *> & src, ggml_custom_op_t op, ggml_kv_score_kind kind, int32_t stream) {
    ggml_tensor * res = ggml_custom_inplace(ctx, dst, nullptr, 0, op, GGML_N_TASKS_MAX, nullptr);

    GGML_ASSERT(src.size() < GGML_MAX_SRC);
    std::copy(src.begin(), src.end(), res->src + 1);

    res->op_params[GGML_KV_SCORE_PARAM_KIND]   = kind;
    res->op_params[GGML_KV_SCORE_PARAM_STREAM] = stream;

    return res;
}

ggml_tensor * llama_kv_score_weights_node(ggml_context * ctx, const llama_kv_score_weights & what) {
    std::vector<ggml_tensor *> src = what.q;
    src.push_back(what.mask);
    src.insert(src.end(), what.sinks.begin(), what.sinks.end());

    ggml_tensor * res = node_of(ctx, what.sums, src, op_weights, GGML_KV_SCORE_WEIGHTS, what.stream);

    res->op_params[GGML_KV_SCORE_PARAM_N_LAYER]  = (int32_t) what.q.size();
    res->op_params[GGML_KV_SCORE_PARAM_HAS_SINK] = !what.sinks.empty();
    memcpy(&res->op_params[GGML_KV_SCORE_PARAM_SCALE],    &what.scale,    sizeof(what.scale));
    memcpy(&res->op_params[GGML_KV_SCORE_PARAM_SOFT_CAP], &what.soft_cap, sizeof(what.soft_cap));
    memcpy(&res->op_params[GGML_KV_SCORE_PARAM_KEYS],     &what.keys,     sizeof(what.keys));

    return res;
}

ggml_tensor * llama_kv_score_choice_node(ggml_context * ctx, ggml_tensor * victims, const llama_kv_score_choice & what, int32_t n_per, int32_t stream,
        int32_t n_stream, int32_t clock) {
    ggml_tensor * res = node_of(ctx, victims, { what.planes, what.now, what.history, what.rows }, op_choice, GGML_KV_SCORE_CHOICE, stream);

    res->op_params[GGML_KV_SCORE_PARAM_N_PER]    = n_per;
    res->op_params[GGML_KV_SCORE_PARAM_N_STREAM] = n_stream;
    res->op_params[GGML_KV_SCORE_PARAM_CLOCK]    = clock;
    res->op_params[GGML_KV_SCORE_PARAM_BIRTH]    = what.birth;
    res->op_params[GGML_KV_SCORE_PARAM_NEGATIVE] = what.negative;

    return res;
}

bool llama_kv_score_covers(ggml_backend_buffer_type_t buft, const ggml_tensor * node) {
    const auto eligible = get_eligible(buft);

    return eligible ? eligible(node) : kv_score_covers(node);
}
