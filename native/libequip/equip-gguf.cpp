// looks at a model file before upstream does: upstream answers some damaged files with an abort

#include "equip-internal.h"
#include "equip-gguf.h"

#include <cstring>
#include <filesystem>
#include <stdexcept>

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

static gguf_ptr open_gguf(const std::string & path) {
    gguf_ptr    res;
    std::string why;

    equip_log_scope   log;
    equip_abort_scope asserts;
    try {
        res.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
    } catch (const std::runtime_error & err) {
        why = equip_format(" (upstream says: %s)", err.what());
    }
    if (!res) {
        equip_fail_damaged(path, why.empty() ? log.quote_first() : why);
    }
    return res;
}

equip_file_info equip_inspect_file(const std::string & path) {
    equip_file_info res;
    res.file_bytes = check_readable(path);

    const gguf_ptr ctx = open_gguf(path);

    res.arch      = equip_gguf_string(ctx.get(), "general.architecture");
    res.n_tensors = gguf_get_n_tensors(ctx.get());

    // "NAME-00001-of-00003.gguf": upstream finds the other parts by their names, and only the first one describes the model
    const int64_t n_split = equip_gguf_max(ctx.get(), "split.count", 1);
    const int64_t i_split = equip_gguf_max(ctx.get(), "split.no", 0);

    if (i_split > 0) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s is part %lld of %lld of a model: give the first part", path.c_str(), (long long) i_split + 1, (long long) n_split);
    }
    // llama.cpp's tools write these beside models
    const std::string type = equip_gguf_string(ctx.get(), "general.type");
    const struct { const char * name; const char * what; } others[] = {
        { "adapter", "a LoRA adapter" }, { "imatrix", "an importance matrix" }, { "mmproj", "the vision or audio part of a model" },
    };
    for (const auto & other : others) {
        if (type == other.name) {
            equip_fail(EQUIP_ERR_MODEL_FILE, "%s is %s, not a model: give the model that it was made for", path.c_str(), other.what);
        }
    }
    if (res.arch.empty()) {
        equip_fail(EQUIP_ERR_MODEL_FILE, "%s names no architecture: it is not a language model", path.c_str());
    }
    equip_check_gguf(path, ctx.get(), res.arch);

    if (n_split > 1 && n_split < 100000) {
        std::vector<char> prefix(path.size() + 1);
        if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_split) > 0) {
            res.file_bytes = 0;
            std::vector<char> part(path.size() + 32);
            for (int64_t i = 0; i < n_split; ++i) {
                llama_split_path(part.data(), part.size(), prefix.data(), i, n_split);
                res.file_bytes += check_readable(part.data());
                if (i > 0) {
                    equip_check_tensors(part.data(), open_gguf(part.data()).get());
                }
            }
        }
    }
    return res;
}
