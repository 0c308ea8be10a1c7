// looks at a model file before upstream does: upstream answers some damaged files with an abort

#include "equip-internal.h"

#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <unordered_set>

namespace fs = std::filesystem;

struct gguf_deleter {
    void operator()(gguf_context * ctx) const {
        gguf_free(ctx);
    }
};

using gguf_ptr = std::unique_ptr<gguf_context, gguf_deleter>;

struct file_closer {
    void operator()(FILE * file) const {
        fclose(file);
    }
};

[[noreturn]] static void fail_damaged(const std::string & path, const std::string & why) {
    equip_fail(EQUIP_ERR_MODEL_FILE, "%s is cut short or damaged: download it again%s", path.c_str(), why.c_str());
}

static uint64_t check_readable(const std::string & path) {
    const fs::path  name = fs::u8path(path);
    std::error_code ec;

    const auto status = fs::status(name, ec);
    if (status.type() == fs::file_type::not_found) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "there is no file %s", path.c_str());
    }
    if (status.type() == fs::file_type::directory) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is a directory: give the GGUF file in it", path.c_str());
    }
    if (status.type() != fs::file_type::regular) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is not a regular file", path.c_str());
    }

    const uint64_t size = fs::file_size(name, ec);
    if (!ec && size == 0) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is empty: download it again", path.c_str());
    }

    std::unique_ptr<FILE, file_closer> file(ggml_fopen(path.c_str(), "rb"));
    char magic[8] = {};
    if (ec || !file) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s cannot be read: check its permissions", path.c_str());
    }
    const size_t n = fread(magic, 1, sizeof(magic), file.get());

    if (n >= 7 && memcmp(magic, "version", 7) == 0) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is a Git LFS pointer, not the model itself: fetch it with 'git lfs pull' or download it", path.c_str());
    }
    if (n < 4 || memcmp(magic, "GGUF", 4) != 0) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is not a GGUF model: llama.cpp's convert_hf_to_gguf.py makes one from other formats", path.c_str());
    }
    return size;
}

// an integer of any width, or the elements of an array of them; false if the key is missing or holds something else
static bool get_ints(const gguf_context * ctx, const std::string & key, std::vector<int64_t> & res) {
    const int64_t id = gguf_find_key(ctx, key.c_str());
    if (id < 0) {
        return false;
    }

    const bool   is_array = gguf_get_kv_type(ctx, id) == GGUF_TYPE_ARRAY;
    const auto   type     = is_array ? gguf_get_arr_type(ctx, id) : gguf_get_kv_type(ctx, id);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return false;
    }
    const size_t n        = is_array ? gguf_get_arr_n(ctx, id)    : 1;
    const void * data     = is_array ? gguf_get_arr_data(ctx, id) : gguf_get_val_data(ctx, id);

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

// largest value, or def
static int64_t get_max(const gguf_context * ctx, const std::string & key, int64_t def) {
    std::vector<int64_t> values;
    return get_ints(ctx, key, values) ? *std::max_element(values.begin(), values.end()) : def;
}

static std::string get_string(const gguf_context * ctx, const std::string & key) {
    const int64_t id = gguf_find_key(ctx, key.c_str());
    return id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_STRING ? gguf_get_val_str(ctx, id) : "";
}

// the numbers that upstream asserts on
static void check_numbers(const std::string & path, const gguf_context * ctx, const std::string & arch) {
    const int64_t n_layer  = get_max(ctx, arch + ".block_count", 1);
    const int64_t n_nextn  = get_max(ctx, arch + ".nextn_predict_layers", 0);
    const int64_t n_expert = get_max(ctx, arch + ".expert_count", 0);
    const int64_t n_used   = get_max(ctx, arch + ".expert_used_count", 0);
    const int64_t n_groups = get_max(ctx, arch + ".expert_group_count", 0);
    const int64_t n_gused  = get_max(ctx, arch + ".expert_group_used_count", 0);
    const bool    one_ok   = arch.compare(0, 7, "hunyuan") == 0 && n_expert <= 1; // upstream drops a single expert there

    const char * wrong =
        n_layer < 1 || n_layer > 512                               ? "block_count"             :
        n_nextn < 0 || n_nextn > n_layer                           ? "nextn_predict_layers"    :
        n_expert < 0 || n_expert > 1024                            ? "expert_count"            :
        !one_ok && (n_used > n_expert || (n_expert > 0 && n_used < 1)) ? "expert_used_count"   :
        n_expert == 0 ? (n_groups != 0                             ? "expert_group_count"      : nullptr) :
        n_groups >= n_expert || (n_groups > 1 && n_expert % n_groups != 0) ? "expert_group_count" :
        n_groups > 1 && (n_gused < 1 || n_gused >= n_groups)       ? "expert_group_used_count" : nullptr;

    for (const char * key : { ".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon", ".attention.group_norm_epsilon" }) {
        const int64_t id = gguf_find_key(ctx, (arch + key).c_str());
        if (id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_FLOAT32 && !(gguf_get_val_f32(ctx, id) >= 0.0f)) {
            wrong = key + 1;
        }
    }

    if (wrong) {
        fail_damaged(path, equip_format(" (its %s.%s makes no sense)", arch.c_str(), wrong));
    }

    const std::string scaling = get_string(ctx, arch + ".rope.scaling.type");
    const char *      known[] = { "", "none", "linear", "yarn", "longrope" };
    if (std::none_of(std::begin(known), std::end(known), [&](const char * name) { return scaling == name; })) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "%s uses the RoPE scaling '%s', which this llama.cpp does not know", path.c_str(), scaling.c_str());
    }
}

// upstream asserts that no token occurs twice
static void check_tokens(const std::string & path, const gguf_context * ctx) {
    const int64_t id = gguf_find_key(ctx, "tokenizer.ggml.tokens");
    if (id < 0 || gguf_get_kv_type(ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ctx, id) != GGUF_TYPE_STRING) {
        return;
    }
    if (get_string(ctx, "tokenizer.ggml.model") == "hybriddna") {
        return; // told apart by upstream itself
    }

    const size_t n = gguf_get_arr_n(ctx, id);

    std::unordered_set<std::string_view> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const std::string_view text = gguf_get_arr_str(ctx, id, i);
        if (!text.empty() && !seen.insert(text).second) {
            fail_damaged(path, equip_format(" (token %zu occurs twice)", i));
        }
    }
}

equip_file_info equip_inspect_file(const std::string & path) {
    equip_file_info res;
    res.file_bytes = check_readable(path);

    gguf_ptr ctx;
    {
        equip_log_scope log;
        ctx.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
        if (!ctx) {
            fail_damaged(path, log.quote_first());
        }
    }

    res.arch      = get_string(ctx.get(), "general.architecture");
    res.n_tensors = gguf_get_n_tensors(ctx.get());

    // "NAME-00001-of-00003.gguf": upstream finds the other parts by their names, and only the first one describes the model
    const int64_t n_split = get_max(ctx.get(), "split.count", 1);
    const int64_t i_split = get_max(ctx.get(), "split.no", 0);

    if (i_split > 0) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is part %lld of %lld of a model: give the first part", path.c_str(), (long long) i_split + 1, (long long) n_split);
    }
    if (res.arch.empty()) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s names no architecture: it is not a language model", path.c_str());
    }
    check_numbers(path, ctx.get(), res.arch);
    check_tokens(path, ctx.get());

    if (n_split > 1 && n_split < 100000) {
        std::vector<char> prefix(path.size() + 1);
        if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_split) > 0) {
            res.file_bytes = 0;
            std::vector<char> part(path.size() + 32);
            for (int64_t i = 0; i < n_split; ++i) {
                llama_split_path(part.data(), part.size(), prefix.data(), i, n_split);
                res.file_bytes += check_readable(part.data());
            }
        }
    }
    return res;
}
