#include "equip-internal.h"

#include "ggml-cpu-probe.h"
#include "json.h"
#include "log.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(GGML_BACKEND_DL)
#    if defined(_WIN32)
#        define NOMINMAX
#        include <windows.h>
#    else
#        include <dlfcn.h>
#    endif
#endif

// EQUIP_VERSION and EQUIP_LLAMA_COMMIT come from pyproject.toml and cmake/pin.json, through CMakeLists.txt

// what the build left out: "amx|avx512bf16"
#ifndef EQUIP_CPU_LEFT_OUT
#    define EQUIP_CPU_LEFT_OUT ""
#endif

#if defined(GGML_BACKEND_DL)
static void anchor() {}

// folder of this library: the backends lie beside it
static std::string own_folder() {
    std::string path;
#    if defined(_WIN32)
    HMODULE module = nullptr;
    char    buf[MAX_PATH];
    if (GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT, (LPCSTR) &anchor, &module)) {
        path.assign(buf, GetModuleFileNameA(module, buf, sizeof(buf)));
    }
#    else
    Dl_info info;
    if (dladdr((void *) &anchor, &info) && info.dli_fname) {
        path = info.dli_fname;
    }
#    endif
    const size_t slash = path.find_last_of("/\\");
    return slash == std::string::npos ? "." : path.substr(0, slash);
}
#endif

void equip_init() {
    static std::once_flag once;
    static std::string    refusal;

    std::call_once(once, [] {
        equip_note_process();
        equip_install_log();

        // llama-common logs through a thread of its own; what matters reaches us as exceptions
        common_log_set_verbosity_thold(-1);

#if defined(GGML_BACKEND_DL)
        ggml_backend_load_all_from_path(own_folder().c_str());
#else
        // the registry leaves out a backend that this processor cannot run
        if (const char * why = ggml_cpu_probe_refusal(ggml_cpu_probe_built())) {
            refusal = why;
            return;
        }
#endif
        if (!ggml_backend_reg_by_name("CPU")) {
            refusal = "no CPU backend could be loaded: reinstall equip-llama";
            return;
        }
        llama_backend_init();
    });

    if (!refusal.empty()) {
        equip_fail(EQUIP_ERR_BACKEND, "%s", refusal.c_str());
    }
    equip_check_fork();
}

void equip_set_rope_upstream(bool value) {
    static const auto set = (void (*)(bool)) [] {
        ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
        return reg ? ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_set_rope_upstream") : nullptr;
    }();
    if (set) {
        set(value);
    }
}

int equip_abi_version(void) {
    return EQUIP_ABI_VERSION;
}

// "a|b|c"
static std::vector<std::string> split_words(const std::string & text) {
    std::vector<std::string> res;
    for (size_t pos = 0; pos < text.size(); ) {
        const size_t end = std::min(text.find('|', pos), text.size());
        res.push_back(text.substr(pos, end - pos));
        pos = end + 1;
    }
    return res;
}

// upstream's names of what the CPU backend was compiled for, as compilers write them: AVX512_BF16 is avx512bf16
static common_json used_instruction_sets() {
    auto res = common_json::array();

    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    auto get = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (const auto * feature = get ? get(reg) : nullptr; feature && feature->name; ++feature) {
        std::string name = feature->name;

        static const char * const libraries[] = { "ACCELERATE", "CPU_HBM", "KLEIDIAI", "LLAMAFILE", "OPENMP", "REPACK" };
        if (strcmp(feature->value, "1") != 0 || std::find(std::begin(libraries), std::end(libraries), name) != std::end(libraries)) {
            continue;
        }
        if (name == "AMX_INT8") {
            if (!ggml_cpu_probe_amx()) {
                continue;
            }
            name = "amx";
        }
        name.erase(std::remove(name.begin(), name.end(), '_'), name.end());
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return (char) std::tolower(c); });
        res.push_back(name);
    }
    return res;
}

// what this processor announces and nothing uses
static common_json left_out_instruction_sets() {
    auto res = common_json::array();

    const auto * probe = ggml_cpu_probe();
    const auto   built = split_words(EQUIP_CPU_LEFT_OUT);
    for (int i = 0; i < GGML_CPU_PROBE_N_SETS; ++i) {
        const char *   name = ggml_cpu_probe_name(i);
        const uint32_t set  = 1u << i;
        if (!name || !(probe->announced & set)) {
            continue;
        }
        const char * reason = nullptr;
        if (probe->faulting & set) {
            reason = "does not work";
        } else if (!(probe->usable & set)) {
            reason = "needs another that does not work";
        } else if (std::find(built.begin(), built.end(), name) != built.end()) {
            reason = "did not work when this was built";
        }
        if (reason) {
            res.push_back({ { "name", name }, { "reason", reason } });
        }
    }
    return res;
}

const char * equip_library_info(void) {
    return equip_guard<>((const char *) nullptr, [] {
        equip_init();

        auto backends = common_json::array();
        for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
            backends.push_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
        }

        auto devices = common_json::array();
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t dev = ggml_backend_dev_get(i);

            size_t free  = 0;
            size_t total = 0;
            ggml_backend_dev_memory(dev, &free, &total);
            if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
                free = (size_t) llama_kv_policy_memory_free(); // upstream answers with all of the memory
            }

            devices.push_back({
                { "name",        ggml_backend_dev_name(dev)        },
                { "description", ggml_backend_dev_description(dev) },
                { "free_bytes",  free                              },
                { "total_bytes", total                             },
            });
        }

        const common_json res = {
            { "version",          EQUIP_VERSION               },
            { "llama_cpp",        EQUIP_LLAMA_COMMIT          },
            { "backends",         backends                    },
            { "devices",          devices                     },
            { "instruction_sets", used_instruction_sets()     },
            { "left_out",         left_out_instruction_sets() },
            { "n_threads",        equip_default_threads()     },
        };
        return equip_return(res.dump_safe());
    });
}

std::vector<equip_policy_desc> equip_policy_registry() {
    std::vector<equip_policy_desc> res;

    for (int32_t i = 0; const char * text = llama_kv_policy_describe(i); ++i) {
        const std::string line  = text;
        const size_t      colon = line.find(':');

        equip_options options(colon == std::string::npos ? "" : line.c_str() + colon + 1);
        res.push_back({
            line.substr(0, colon),
            split_words(options.get_word("scope",     "token")),
            split_words(options.get_word("positions", "true")),
            split_words(options.get_word("update",    "inplace")),
            options.get_bool("recent", false),
            options.get_bool("scores", false),
            options.get_bool("pages",  false),
            options.get_int ("evict_every", 0, 0, INT32_MAX),
            {},
        });
        llama_kv_policy_param param;
        for (int32_t j = 0; llama_kv_policy_get_param(i, j, &param); ++j) {
            res.back().params.push_back(param);
        }
    }
    return res;
}

const char * equip_policies(void) {
    return equip_guard<>((const char *) nullptr, [] {
        auto res = common_json::array();

        res.push_back({
            { "name",              "none"                        },
            { "scopes",            common_json::array({"token"}) },
            { "positions",         common_json::array({"true"})  },
            { "updates",           common_json::array()          },
            { "default_positions", "true"                        },
            { "default_scope",     "token"                       },
            { "scores",            false                         },
            { "pages",             false                         },
            { "evict_every",       0                             },
            { "parameters",        common_json::array()          },
        });

        for (const auto & desc : equip_policy_registry()) {
            auto params = common_json::array();
            for (const auto & param : desc.params) {
                params.push_back({
                    { "name",      param.name      },
                    { "type",      param.type      },
                    { "default",   param.def       },
                    { "published", param.published },
                    { "min",       param.min       },
                    { "max",       param.max       },
                    { "help",      param.help      },
                });
            }
            res.push_back({
                { "name",              desc.name                                              },
                { "scopes",            desc.scopes                                            },
                { "positions",         desc.positions                                         },
                { "updates",           desc.updates                                           },
                { "default_positions", desc.positions.empty() ? "true"  : desc.positions.front() },
                { "default_scope",     desc.scopes.empty()    ? "token" : desc.scopes.front()    },
                { "scores",            desc.reads_scores                                      },
                { "pages",             desc.has_pages                                         },
                { "evict_every",       desc.evict_every                                       },
                { "parameters",        params                                                 },
            });
        }
        return equip_return(res.dump_safe());
    });
}
