// how deep a text nests: upstream's parsers, and what they make of it, recurse once per level

#include "equip-internal.h"

#include "text-depth.h"

#include <algorithm>
#include <cstring>

static const size_t MAX_TEMPLATE = 200; // at near 3 KiB of stack each, a thread of 1 MiB stands it

static const size_t MAX_TEXT = 16 << 20; // bytes

static void check_size(size_t n, const char * what) {
    if (n > MAX_TEXT) {
        equip_fail(EQUIP_ERR_USAGE, "%s longer than %zu MiB: shorten the text", what, MAX_TEXT >> 20);
    }
}

void equip_check_json_depth(const char * text, const char * what) {
    check_size(strlen(text), what);

    if (json_depth(text) > JSON_MAX_DEPTH) {
        equip_fail(EQUIP_ERR_USAGE, "%s nested more than %zu levels deep: flatten the JSON", what, JSON_MAX_DEPTH);
    }
}

// an expression nests by its brackets, and by its operators: a + b + c is ((a + b) + c)
struct template_depth {
    std::vector<size_t> blocks; // of each open if, for, macro, ...: 1, and 1 for each of its elif
    std::vector<size_t> levels; // of each open bracket: the operators since the last comma

    size_t n_blocks = 0;
    size_t n_levels = 0;

    void add(std::vector<size_t> & to, size_t & sum) {
        if (!to.empty()) {
            to.back()++;
            sum++;
        }
    }
    void open(std::vector<size_t> & to, size_t & sum) {
        to.push_back(1);
        sum++;
    }
    void close(std::vector<size_t> & to, size_t & sum) {
        if (!to.empty()) {
            sum -= to.back();
            to.pop_back();
        }
    }
    void check() const {
        if (n_blocks + n_levels > MAX_TEMPLATE) {
            equip_fail(EQUIP_ERR_USAGE, "the chat template nests more than %zu levels deep, or has as many operators in one expression: split it with {%% set %%}",
                    MAX_TEMPLATE);
        }
    }
};

static bool is_word(char c) {
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

// one tag, from behind its opening to behind its end
static const char * scan_tag(const char * p, bool is_statement, template_depth & depth) {
    std::string name; // first word of a statement
    bool        assigns = false;

    depth.levels.clear();
    depth.n_levels = 0;
    depth.open(depth.levels, depth.n_levels);

    while (*p) {
        const bool closes = depth.levels.size() == 1 && ((is_statement && p[0] == '%' && p[1] == '}') || (!is_statement && p[0] == '}' && p[1] == '}'));
        if (closes) {
            p += 2;
            break;
        }
        if (*p == '\'' || *p == '"') {
            const char quote = *p++;
            while (*p && *p != quote) {
                p += *p == '\\' && p[1] ? 2 : 1;
            }
            p += *p ? 1 : 0;
            continue;
        }
        if (is_word(*p)) {
            const char * begin = p;
            while (is_word(*p)) {
                ++p;
            }
            const std::string word(begin, p);
            if (is_statement && name.empty()) {
                name = word;
            }
            for (const char * op : { "and", "or", "not", "if", "else", "is", "in" }) {
                if (word == op) {
                    depth.add(depth.levels, depth.n_levels);
                }
            }
        } else {
            if (strchr("([{", *p)) {
                depth.open(depth.levels, depth.n_levels);
            } else if (strchr(")]}", *p)) {
                if (depth.levels.size() > 1) {
                    // what follows a bracket belongs to it: f()()(), x[0][0][0]
                    depth.close(depth.levels, depth.n_levels);
                    depth.add(depth.levels, depth.n_levels);
                }
            } else if (*p == ',') {
                depth.n_levels -= depth.levels.back() - 1;
                depth.levels.back() = 1;
            } else if (strchr("+-*/%~|.=<>!", *p)) {
                assigns = assigns || (*p == '=' && depth.levels.size() == 1);
                depth.add(depth.levels, depth.n_levels);
            }
            ++p;
        }
        depth.check();
    }
    depth.n_levels = 0;
    depth.levels.clear();

    const bool opens = name == "if" || name == "for" || name == "macro" || name == "call" || name == "filter" || name == "generation" || name == "block" ||
        name == "with" || (name == "set" && !assigns);
    if (opens) {
        depth.open(depth.blocks, depth.n_blocks);
    } else if (name == "elif") {
        depth.add(depth.blocks, depth.n_blocks);
    } else if (name.compare(0, 3, "end") == 0) {
        depth.close(depth.blocks, depth.n_blocks);
    }
    depth.check();
    return p;
}

void equip_check_template_depth(const char * text) {
    check_size(strlen(text), "the chat template is");

    template_depth depth;
    for (const char * p = text; *p; ) {
        if (p[0] == '{' && p[1] == '#') {
            const char * end = strstr(p + 2, "#}");
            p = end ? end + 2 : p + strlen(p);
        } else if (p[0] == '{' && (p[1] == '{' || p[1] == '%')) {
            p = scan_tag(p + 2, p[1] == '%', depth);
        } else {
            ++p;
        }
    }
}
