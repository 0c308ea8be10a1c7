#include "equip-internal.h"

#include <cstdio>
#include <cstring>

#ifdef _WIN32
#include <io.h>
#else
#include <unistd.h>
#endif

static std::atomic<int> verbosity { 0 };

// the calling thread's open scope, if there is one
static thread_local std::vector<std::string> * collected = nullptr;
static thread_local ggml_log_level             last_level = GGML_LOG_LEVEL_NONE;

// a terminal obeys control characters, and upstream's lines quote what a model's file says
static void print(const char * text) {
#ifdef _WIN32
    static const bool is_terminal = _isatty(_fileno(stderr)) != 0;
#else
    static const bool is_terminal = isatty(fileno(stderr)) != 0;
#endif
    if (!is_terminal) {
        fputs(text, stderr);
        return;
    }

    for (const unsigned char * p = (const unsigned char *) text; *p; ++p) {
        const bool is_c1 = p[0] == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0; // U+0080 to U+009F in UTF-8
        if (is_c1 || (*p < 0x20 && *p != '\n' && *p != '\t') || *p == 0x7f) {
            fputc('?', stderr);
            p += is_c1;
        } else {
            fputc(*p, stderr);
        }
    }
}

static void log_callback(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level != GGML_LOG_LEVEL_CONT) {
        last_level = level;
    }

    const bool is_problem = last_level == GGML_LOG_LEVEL_ERROR || last_level == GGML_LOG_LEVEL_WARN;

    // upstream's debug level lists every tensor of every graph: 3 is for people who work on it
    const int needed = is_problem ? 1 : last_level == GGML_LOG_LEVEL_DEBUG ? 3 : 2;

    if (verbosity >= needed) {
        print(text);
    }

    if (collected && last_level == GGML_LOG_LEVEL_ERROR) {
        try {
            if (level == GGML_LOG_LEVEL_CONT && !collected->empty()) {
                collected->back() += text;
            } else {
                collected->push_back(text);
            }
        } catch (const std::bad_alloc &) {
            // a log line is not worth an exception in upstream's code
        }
    }
}

// upstream's logger is one global; another user of the library in this process (a binding) may have set its own.
// ours is in place while a scope is open, and theirs again after the last one
static std::mutex        logger_mutex;
static int               n_open = 0;
static ggml_log_callback foreign_callback  = nullptr;
static void *            foreign_user_data = nullptr;

equip_log_scope::equip_log_scope() : outer(collected) {
    {
        std::lock_guard<std::mutex> lock(logger_mutex);
        if (n_open++ == 0) {
            llama_log_get(&foreign_callback, &foreign_user_data);
            if (foreign_callback != log_callback) {
                llama_log_set(log_callback, nullptr);
            }
        }
    }
    if (!outer) {
        collected = &lines;
    }
}

equip_log_scope::~equip_log_scope() {
    collected = outer;

    std::lock_guard<std::mutex> lock(logger_mutex);
    if (--n_open == 0 && foreign_callback != log_callback) {
        llama_log_set(foreign_callback, foreign_user_data);
    }
}

// "llama_model_load: error loading model: x\n" -> "error loading model: x"
static std::string strip(const std::string & line) {
    std::string res = line;

    while (!res.empty() && (res.back() == '\n' || res.back() == ' ' || res.back() == '.')) {
        res.pop_back();
    }

    const size_t colon = res.find(": ");
    if (colon != std::string::npos && res.find(' ') > colon) {
        res.erase(0, colon + 2);
    }

    // wrappers that repeat what our own sentence says
    for (const char * wrapper : { "error loading model: ", "failed to initialize the context: " }) {
        if (res.compare(0, strlen(wrapper), wrapper) == 0) {
            res.erase(0, strlen(wrapper));
        }
    }
    return res;
}

std::string equip_log_scope::first_error() const {
    return lines.empty() ? "" : strip(lines.front());
}

std::string equip_log_scope::last_error() const {
    for (auto it = lines.rbegin(); it != lines.rend(); ++it) {
        const std::string res = strip(*it);
        if (!res.empty() && res != "failed to load model") {
            return res;
        }
    }
    return first_error();
}

bool equip_log_scope::mentions(const char * text) const {
    for (const auto & line : lines) {
        if (line.find(text) != std::string::npos) {
            return true;
        }
    }
    return false;
}

static std::string as_quote(const std::string & line) {
    return line.empty() ? "" : " (upstream says: " + line + ")";
}

std::string equip_log_scope::quote() const {
    return as_quote(last_error());
}

std::string equip_log_scope::quote_first() const {
    return as_quote(first_error());
}

void equip_install_log() {
    llama_log_set(log_callback, nullptr);
}

void equip_set_verbosity(int level) {
    verbosity = level;
}
