// the numbers of a model file that upstream asserts on, divides by or allocates by

#include "equip-internal.h"
#include "equip-gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <unordered_set>

static const int64_t MAX_LAYERS  = 512;     // upstream's LLAMA_MAX_LAYERS
static const int64_t MAX_EXPERTS = 1024;    // upstream's LLAMA_MAX_EXPERTS
static const int64_t MAX_TOKENS  = 1 << 30; // slot arithmetic is done in 32 bits
static const int64_t MAX_WIDTH   = 1 << 24; // of a row: far above any model, far below where products of two overflow

void equip_fail_damaged(const std::string & path, const std::string & why) {
    equip_fail(EQUIP_ERR_MODEL_FILE, "%s is cut short or damaged: download it again%s", path.c_str(), why.c_str());
}

// an integer of any width, or the elements of an array of them; false if the key is missing or holds something else
static bool get_ints(const gguf_context * ctx, const std::string & key, std::vector<int64_t> & res) {
    const int64_t id = gguf_find_key(ctx, key.c_str());
    if (id < 0) {
        return false;
    }

    const bool is_array = gguf_get_kv_type(ctx, id) == GGUF_TYPE_ARRAY;
    const auto type     = is_array ? gguf_get_arr_type(ctx, id) : gguf_get_kv_type(ctx, id);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return false;
    }
    const size_t n      = is_array ? gguf_get_arr_n(ctx, id)    : 1;
    const void * data   = is_array ? gguf_get_arr_data(ctx, id) : gguf_get_val_data(ctx, id);

    res.clear();
    for (size_t i = 0; i < n; ++i) {
        switch (type) {
            case GGUF_TYPE_UINT8:  res.push_back(((const uint8_t  *) data)[i]); break;
            case GGUF_TYPE_INT8:   res.push_back(((const int8_t   *) data)[i]); break;
            case GGUF_TYPE_UINT16: res.push_back(((const uint16_t *) data)[i]); break;
            case GGUF_TYPE_INT16:  res.push_back(((const int16_t  *) data)[i]); break;
            case GGUF_TYPE_UINT32: res.push_back(((const uint32_t *) data)[i]); break;
            case GGUF_TYPE_INT32:  res.push_back(((const int32_t  *) data)[i]); break;
            case GGUF_TYPE_UINT64: res.push_back(((const uint64_t *) data)[i]); break;
            case GGUF_TYPE_INT64:  res.push_back(((const int64_t  *) data)[i]); break;
            default: return false;
        }
    }
    return !res.empty();
}

int64_t equip_gguf_max(const gguf_context * ctx, const std::string & key, int64_t def) {
    std::vector<int64_t> values;
    return get_ints(ctx, key, values) ? *std::max_element(values.begin(), values.end()) : def;
}

std::string equip_gguf_string(const gguf_context * ctx, const std::string & key) {
    const int64_t id = gguf_find_key(ctx, key.c_str());
    return id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_STRING ? gguf_get_val_str(ctx, id) : "";
}

struct checker {
    const std::string  & path;
    const gguf_context * ctx;
    const std::string  & arch;

    [[noreturn]] void fail(const std::string & key) const {
        equip_fail_damaged(path, equip_format(" (its %s makes no sense)", (key[0] == '.' ? arch + key : key).c_str()));
    }

    std::vector<int64_t> ints(const char * key) const {
        std::vector<int64_t> res;
        return get_ints(ctx, arch + key, res) ? res : std::vector<int64_t>();
    }

    // every value of the key, if it is there
    void range(const char * key, int64_t min, int64_t max) const {
        for (const int64_t value : ints(key)) {
            if (value < min || value > max) {
                fail(key);
            }
        }
    }
};

static void check_sizes(const checker & c) {
    c.range(".block_count",      1, MAX_LAYERS);
    c.range(".context_length",   0, MAX_TOKENS);
    c.range(".vocab_size",       0, MAX_WIDTH);
    c.range(".embedding_length", 1, MAX_WIDTH);

    for (const char * key : { ".embedding_length_out", ".features_length", ".feed_forward_length", ".expert_feed_forward_length",
            ".expert_shared_feed_forward_length", ".embedding_length_per_layer_input", ".ssm.conv_kernel", ".ssm.inner_size",
            ".ssm.state_size", ".shortconv.l_cache", ".attention.q_lora_rank", ".attention.kv_lora_rank" }) {
        c.range(key, 0, MAX_WIDTH);
    }

    // a window may be as long as the context; no window is 0
    c.range(".attention.sliding_window", 0, MAX_TOKENS);

    // upstream divides by these, in the architectures that read them; others may carry a 0
    const bool has_ssm = equip_gguf_max(c.ctx, c.arch + ".ssm.inner_size", 0) > 0;

    const auto is = [&](std::initializer_list<const char *> names) {
        return std::any_of(names.begin(), names.end(), [&](const char * name) { return c.arch == name; });
    };
    const struct { const char * key; bool is_read; } divisors[] = {
        { ".attention.group_norm_groups",  is({ "wavtokenizer-dec" })                      },
        { ".ssm.time_step_rank",           has_ssm                                         },
        { ".ssm.group_count",              has_ssm && !is({ "mamba", "jamba", "plamo2" })  },
        { ".wkv.head_size",                c.arch.find("rwkv") != std::string::npos        },
        { ".attention.output_group_count", is({ "deepseek4", "dflash" })                   },
        { ".experts_per_group",            is({ "grovemoe" })                              },
        { ".interleave_moe_layer_step",    is({ "ernie4_5-moe" })                          }, // 0: no layer of a dense llama4 has experts
    };
    for (const auto & d : divisors) {
        c.range(d.key, d.is_read ? 1 : 0, MAX_WIDTH);
    }
}

static void check_heads(const checker & c) {
    const auto n_head    = c.ints(".attention.head_count");
    const auto n_head_kv = c.ints(".attention.head_count_kv");

    c.range(".attention.head_count",    0, 1 << 16);
    c.range(".attention.head_count_kv", 0, 1 << 16);

    // one number for all layers, or one for each
    for (size_t il = 0; il < std::max(n_head.size(), n_head_kv.size()) && !n_head.empty() && !n_head_kv.empty(); ++il) {
        const int64_t n    = n_head[std::min(il, n_head.size() - 1)];
        const int64_t n_kv = n_head_kv[std::min(il, n_head_kv.size() - 1)];
        if (n > 0 && n_kv > 0 && n % n_kv != 0) {
            c.fail(".attention.head_count_kv");
        }
    }

    const int64_t n_embd = equip_gguf_max(c.ctx, c.arch + ".embedding_length", 0);
    const int64_t n_max  = n_head.empty() ? 0 : *std::max_element(n_head.begin(), n_head.end());
    if (n_max == 0) {
        return;
    }

    // upstream's default of a head's size
    const int64_t by_width = n_embd / (n_head[0] > 0 ? n_head[0] : n_max);

    for (const char * part : { "", "_swa" }) {
        const std::string key_length   = std::string(".attention.key_length")   + part;
        const std::string value_length = std::string(".attention.value_length") + part;
        const std::string n_rot        = std::string(".rope.dimension_count")   + part;

        c.range(key_length.c_str(),   1, 1 << 16);
        c.range(value_length.c_str(), 1, 1 << 16);
        if (by_width < 1 && (c.ints(".attention.key_length").empty() || c.ints(".attention.value_length").empty())) {
            c.fail(".attention.head_count");
        }

        const auto width = c.ints(key_length.c_str());
        const int64_t d  = !width.empty() ? width[0] : equip_gguf_max(c.ctx, c.arch + ".attention.key_length", by_width);

        // pairs of values are rotated; no rotation at all is written as 0, by models without RoPE only
        const auto rot = c.ints(n_rot.c_str());
        if (!rot.empty() && (rot[0] < 0 || rot[0] > d || rot[0] % 2 != 0)) {
            c.fail(n_rot);
        }
    }
}

static void check_experts(const checker & c) {
    const int64_t n_layer  = equip_gguf_max(c.ctx, c.arch + ".block_count", 1);
    const int64_t n_nextn  = equip_gguf_max(c.ctx, c.arch + ".nextn_predict_layers", 0);
    const int64_t n_expert = equip_gguf_max(c.ctx, c.arch + ".expert_count", 0);
    const int64_t n_used   = equip_gguf_max(c.ctx, c.arch + ".expert_used_count", 0);
    const int64_t n_groups = equip_gguf_max(c.ctx, c.arch + ".expert_group_count", 0);
    const int64_t n_gused  = equip_gguf_max(c.ctx, c.arch + ".expert_group_used_count", 0);
    const bool    one_ok   = c.arch.compare(0, 7, "hunyuan") == 0 && n_expert <= 1; // upstream drops a single expert there

    const char * wrong =
        n_nextn < 0 || n_nextn > n_layer                                   ? ".nextn_predict_layers"    :
        n_expert < 0 || n_expert > MAX_EXPERTS                             ? ".expert_count"            :
        !one_ok && (n_used > n_expert || (n_expert > 0 && n_used < 1))     ? ".expert_used_count"       :
        n_expert == 0 ? (n_groups != 0                                     ? ".expert_group_count"      : nullptr) :
        n_groups >= n_expert || (n_groups > 1 && n_expert % n_groups != 0) ? ".expert_group_count"      :
        n_groups > 1 && (n_gused < 1 || n_gused >= n_groups)               ? ".expert_group_used_count" : nullptr;
    if (wrong) {
        c.fail(wrong);
    }
    c.range(".expert_used_count", 0, MAX_EXPERTS);
    c.range(".expert_shared_count", 0, MAX_EXPERTS);
    c.range(".leading_dense_block_count", 0, MAX_LAYERS);
}

// a number that is none, an infinite one (but for a bound that does not bind), an epsilon below zero, a negative base of a rotation
static void check_floats(const checker & c) {
    for (int64_t id = 0; id < gguf_get_n_kv(c.ctx); ++id) {
        const std::string key  = gguf_get_key(c.ctx, id);
        const auto        type = gguf_get_kv_type(c.ctx, id);
        if (key.compare(0, c.arch.size() + 1, c.arch + ".") != 0 || (type != GGUF_TYPE_FLOAT32 && type != GGUF_TYPE_FLOAT64)) {
            continue;
        }
        const double value = type == GGUF_TYPE_FLOAT32 ? (double) gguf_get_val_f32(c.ctx, id) : gguf_get_val_f64(c.ctx, id);
        const bool   is_eps  = key.find("epsilon") != std::string::npos;
        const bool   is_base = key.find(".rope.freq_base") != std::string::npos;
        const bool   is_free = std::isinf(value) && (key.find("_bound") != std::string::npos || key.find("_limit") != std::string::npos);
        if ((!std::isfinite(value) && !is_free) || (is_eps && value < 0.0) || (is_base && value < 0.0)) {
            c.fail(key);
        }
    }

    const std::string scaling = equip_gguf_string(c.ctx, c.arch + ".rope.scaling.type");
    const char *      known[] = { "", "none", "linear", "yarn", "longrope" };
    if (std::none_of(std::begin(known), std::end(known), [&](const char * name) { return scaling == name; })) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "%s uses the RoPE scaling '%s', which this llama.cpp does not know", c.path.c_str(), scaling.c_str());
    }
}

static bool ends_with(const std::string & text, const char * end) {
    const size_t n = strlen(end);
    return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

// what no operation computes with, on the CPU at least: upstream finds out in the middle of a graph
void equip_check_tensors(const std::string & path, const gguf_context * ctx) {
    for (int64_t i = 0; i < gguf_get_n_tensors(ctx); ++i) {
        const std::string name = gguf_get_tensor_name(ctx, i);
        const ggml_type   type = gguf_get_tensor_type(ctx, i);

        // tables of token ids
        const bool is_table = name.find("tid2eid") != std::string::npos || name.compare(0, 3, "d2t") == 0 || name.compare(0, 3, "t2d") == 0;

        const bool never = type == GGML_TYPE_I8 || type == GGML_TYPE_I16 || type == GGML_TYPE_F64 || type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K ||
            type == GGML_TYPE_I32 || type == GGML_TYPE_I64;

        // what is added or multiplied element by element, and what an operation of its own reads
        bool is_plain = false;
        for (const char * end : { ".bias", "norm.weight", ".scale", "attn_sinks.weight", "rope_freqs.weight", "rope_factors_long.weight",
                "rope_factors_short.weight", ".ssm_a", ".ssm_d", ".ssm_conv1d.weight", ".shortconv.conv.weight" }) {
            is_plain = is_plain || ends_with(name, end);
        }

        if (!is_table && (never || (is_plain && type != GGML_TYPE_F32))) {
            equip_fail_damaged(path, equip_format(" (its tensor %s has the type %s)", name.c_str(), ggml_type_name(type)));
        }
    }
}

// upstream asserts that no token occurs twice
static void check_tokens(const checker & c) {
    const int64_t id = gguf_find_key(c.ctx, "tokenizer.ggml.tokens");
    if (id < 0 || gguf_get_kv_type(c.ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(c.ctx, id) != GGUF_TYPE_STRING) {
        return;
    }
    if (equip_gguf_string(c.ctx, "tokenizer.ggml.model") == "hybriddna") {
        return; // told apart by upstream itself
    }

    const size_t n = gguf_get_arr_n(c.ctx, id);

    std::unordered_set<std::string_view> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const std::string_view text = gguf_get_arr_str(c.ctx, id, i);
        if (!text.empty() && !seen.insert(text).second) {
            equip_fail_damaged(c.path, equip_format(" (token %zu occurs twice)", i));
        }
    }
}

void equip_check_gguf(const std::string & path, const gguf_context * ctx, const std::string & arch) {
    const checker c = { path, ctx, arch };
    check_sizes  (c);
    check_heads  (c);
    check_experts(c);
    check_floats (c);
    check_tokens (c);
    equip_check_tensors(path, ctx);
}
