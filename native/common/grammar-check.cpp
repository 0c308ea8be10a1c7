// looks at a grammar before upstream does, whose parser recurses once per bracket and per rule that begins with another rule,
// and whose sampler follows every way in which a text may go on

#include "grammar-check.h"

#include "common.h"
#include "text-depth.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <vector>

static const size_t MAX_DEPTH    = 100;     // brackets in brackets
static const size_t MAX_RULES    = 20000;   // brackets and repetitions count: upstream makes rules of them
static const size_t MAX_CHAIN    = 2000;    // rules that begin with each other; 150 bytes of stack each
static const size_t MAX_ELEMENTS = 1 << 20; // characters and references, repetitions written out
static const size_t MAX_WAYS     = 5000;    // in which a text may go on at one place
static const size_t MAX_ROW      = 300;     // optional parts one after the other: each may follow each
static const size_t MAX_REPEAT   = 2000;    // as upstream

[[noreturn]] static void refuse(const std::string & why) {
    throw std::invalid_argument("the grammar " + why);
}

struct grammar_item {
    int32_t rule; // -1: characters or a token
    size_t  size; // elements that it is made of
    size_t  min;
    size_t  max;
};

using grammar_sequence = std::vector<grammar_item>;

struct grammar_rule {
    std::vector<grammar_sequence> ways; // alternatives
    bool   nullable = false; // may be empty
    int    state    = 0;     // of the search: 0 new, 1 open, 2 done
    size_t n_ways   = 0;     // how many places a text may begin at

};

class grammar_reader {
  public:
    explicit grammar_reader(const std::string & text) : p(text.c_str()) {}

    void check() {
        read();
        find_nullable();
        for (size_t i = 0; i < rules.size(); ++i) {
            search((int32_t) i);
        }
        for (const auto & rule : rules) {
            bool too_many = rule.n_ways > MAX_WAYS;
            for (const auto & way : rule.ways) {
                size_t row = 0;
                for (size_t i = 0; i < way.size(); ++i) {
                    row = is_nullable(way[i]) ? row + copies(way[i]) : 0;
                    too_many = too_many || row > MAX_ROW || count_from(way, i) > MAX_WAYS;
                }
            }
            if (too_many) {
                refuse(string_format("leaves too many ways to go on at one place (more than %zu, or more than %zu optional parts in a row): simplify it", MAX_WAYS, MAX_ROW));
            }
        }
    }

  private:
    const char * p;

    std::vector<grammar_rule>                rules;
    std::unordered_map<std::string, int32_t> names;
    std::vector<int32_t>                     open; // the rule that is read, and the brackets in it
    size_t                                   n_elements = 0;
    size_t                                   n_rules    = 0;

    void count_rule() {
        if (++n_rules > MAX_RULES) {
            refuse(string_format("has more than %zu rules, brackets and repetitions: use a smaller one", MAX_RULES));
        }
    }

    int32_t add_rule() {
        count_rule();
        rules.emplace_back();
        return (int32_t) rules.size() - 1;
    }

    int32_t named(const std::string & name) {
        const auto it = names.find(name);
        if (it != names.end()) {
            return it->second;
        }
        return names[name] = add_rule();
    }

    static bool is_word(char c) {
        return c == '-' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    }

    void push(int32_t rule, size_t size) {
        if (!open.empty()) {
            rules[open.back()].ways.back().push_back({ rule, size, 1, 1 });
            count(size);
        }
    }

    void count(size_t n) {
        n_elements += n;
        if (n_elements > MAX_ELEMENTS) {
            refuse(string_format("has more than %zu characters with its repetitions written out: use a smaller one", MAX_ELEMENTS));
        }
    }

    // of the item read last
    void repeat(size_t min, size_t max) {
        if (max < min || min > MAX_REPEAT) {
            refuse(string_format("repeats something {%zu,%zu} times: the second number must not be the smaller one, nor the first one above %zu",
                    min, max, MAX_REPEAT));
        }
        if (open.empty() || rules[open.back()].ways.back().empty()) {
            return; // upstream says what is wrong
        }
        count_rule();

        grammar_item & item = rules[open.back()].ways.back().back();
        max = max > MAX_REPEAT ? SIZE_MAX : max;

        count(item.size * (std::max<size_t>(min, 1) + (max == SIZE_MAX ? 1 : max - min)));

        item.size = std::min(item.size * std::max<size_t>(min, 1), MAX_ELEMENTS);
        item.min  = item.min == 0 || min == 0 ? 0 : std::min(item.min * min, MAX_ELEMENTS);
        item.max  = item.max == SIZE_MAX || max == SIZE_MAX ? SIZE_MAX : std::min(item.max * max, MAX_ELEMENTS);
    }

    size_t read_number() {
        size_t res = 0;
        while (*p >= '0' && *p <= '9') {
            res = std::min<size_t>(res * 10 + (*p++ - '0'), MAX_ELEMENTS);
        }
        return res;
    }

    void skip_space() {
        while (*p == ' ' || *p == '\t' || *p == '\r' || *p == '\n' || *p == '#') {
            if (*p == '#') {
                p += strcspn(p, "\r\n");
            } else {
                ++p;
            }
        }
    }

    // up to the closing character; returns how many there were
    size_t read_quoted(char end) {
        size_t n = 0;
        for (++p; *p && *p != end; ++n) {
            p += *p == '\\' && p[1] ? 2 : 1;
        }
        p += *p ? 1 : 0;
        return n;
    }

    void read() {
        for (skip_space(); *p; skip_space()) {
            if (is_word(*p)) {
                const char * begin = p;
                while (is_word(*p)) {
                    ++p;
                }
                const std::string name(begin, p);
                const char *      behind = p;
                skip_space();
                if (strncmp(p, "::=", 3) == 0) {
                    p += 3;
                    open = { named(name) };
                    rules[open[0]].ways.emplace_back();
                } else {
                    p = behind;
                    push(named(name), 1);
                }
            } else if (*p == '"') {
                const size_t n = read_quoted('"');
                if (n > 0) {
                    push(-1, n);
                }
            } else if (*p == '[') {
                const size_t n = read_quoted(']');
                if (n > 0) {
                    push(-1, n);
                }
            } else if (*p == '<') {
                read_quoted('>');
                push(-1, 1);
            } else if (*p == '.') {
                ++p;
                push(-1, 1);
            } else if (*p == '(') {
                ++p;
                const int32_t rule = add_rule();
                push(rule, 1);
                open.push_back(rule);
                rules[rule].ways.emplace_back();
                if (open.size() > MAX_DEPTH) {
                    refuse(string_format("nests brackets more than %zu levels deep: give the inner ones rules of their own", MAX_DEPTH));
                }
            } else if (*p == ')') {
                ++p;
                if (open.size() > 1) {
                    open.pop_back();
                }
            } else if (*p == '|') {
                ++p;
                if (!open.empty()) {
                    rules[open.back()].ways.emplace_back();
                }
            } else if (*p == '*') {
                ++p;
                repeat(0, SIZE_MAX);
            } else if (*p == '+') {
                ++p;
                repeat(1, SIZE_MAX);
            } else if (*p == '?') {
                ++p;
                repeat(0, 1);
            } else if (*p == '{') {
                ++p;
                skip_space();
                const size_t min = read_number();
                size_t       max = min;
                skip_space();
                if (*p == ',') {
                    ++p;
                    skip_space();
                    max = *p >= '0' && *p <= '9' ? read_number() : SIZE_MAX;
                }
                repeat(min, max);
            } else {
                ++p; // '!', '}', and what upstream refuses
            }
        }
    }

    bool is_nullable(const grammar_item & item) const {
        return item.min == 0 || (item.rule >= 0 && rules[item.rule].nullable);
    }

    // how often it stands in a row, if each of them may be empty
    size_t copies(const grammar_item & item) const {
        return item.rule >= 0 && rules[item.rule].nullable && item.max != SIZE_MAX ? item.max : 1;
    }

    void find_nullable() {
        for (bool changed = true; changed; ) {
            changed = false;
            for (auto it = rules.rbegin(); it != rules.rend(); ++it) {
                if (!it->nullable && std::any_of(it->ways.begin(), it->ways.end(), [&](const grammar_sequence & way) {
                        return std::all_of(way.begin(), way.end(), [&](const grammar_item & item) { return is_nullable(item); });
                    })) {
                    it->nullable = changed = true;
                }
            }
        }
    }

    // from this item on, as far as the items may be empty
    size_t count_from(const grammar_sequence & way, size_t i) const {
        size_t res = 0;
        for (; i < way.size() && res <= MAX_WAYS; ++i) {
            const auto & item  = way[i];
            res += copies(item) * (item.rule >= 0 ? std::max<size_t>(rules[item.rule].n_ways, 1) : 1) + (item.min == 0 ? 1 : 0);
            if (!is_nullable(item)) {
                break;
            }
        }
        return std::min(res, MAX_WAYS + 1);
    }

    // depth first, without recursion: n_ways of what a rule may begin with, before its own
    void search(int32_t first) {
        struct frame {
            int32_t rule;
            size_t  way;
            size_t  item;
            bool    tail; // nothing follows the item that is open
        };
        std::vector<frame> stack;
        const auto enter = [&](int32_t rule) {
            if (rules[rule].state == 0) {
                rules[rule].state = 1;
                stack.push_back({ rule, 0, 0, false });
                if (stack.size() > MAX_CHAIN) {
                    refuse(string_format("has more than %zu rules that begin with each other: use a smaller one", MAX_CHAIN));
                }
            }
        };

        enter(first);
        while (!stack.empty()) {
            const size_t top  = stack.size() - 1;
            auto &       rule = rules[stack[top].rule];

            if (stack[top].way == rule.ways.size()) {
                for (const auto & way : rule.ways) {
                    rule.n_ways = std::min(rule.n_ways + std::max<size_t>(count_from(way, 0), 1), MAX_WAYS + 1);
                }
                rule.state = 2;
                stack.pop_back();
                continue;
            }

            const auto & way = rule.ways[stack[top].way];
            if (stack[top].item == way.size()) {
                stack[top].way++;
                stack[top].item = 0;
                continue;
            }

            const auto & item = way[stack[top].item++];
            stack[top].tail   = stack[top].item == way.size() && item.max == 1;
            if (!is_nullable(item)) {
                stack[top].item = way.size();
            }
            if (item.rule < 0) {
                continue;
            }
            if (rules[item.rule].state == 1) {
                // a rule that begins with itself: without an end, if something is left to do each time
                for (size_t i = stack.size(); i-- > 0; ) {
                    if (!stack[i].tail) {
                        refuse("has a rule that begins with itself (left recursion): write its repetition as ( ... )*");
                    }
                    if (stack[i].rule == item.rule) {
                        break;
                    }
                }
            }
            enter(item.rule);
        }
    }
};

void grammar_check(const std::string & text) {
    grammar_reader(text).check();
}

void sampling_check(const common_params_sampling & params) {
    grammar_check(common_grammar_value(params.grammar));

    for (const auto & trigger : params.grammar_triggers) {
        if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN || trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL) {
            pattern_check_depth(trigger.value);
        }
    }
}
