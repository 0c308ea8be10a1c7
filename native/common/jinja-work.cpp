#include "jinja-work.h"

#include "jinja/value.h"

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

static thread_local size_t work_depth = 0;
static thread_local size_t work_done  = 0;
static thread_local size_t work_limit = work_guard::MAX_WORK;

work_guard::work_guard() {
    charge(1);
    if (work_depth >= MAX_DEPTH) {
        throw std::runtime_error("the template nests or calls itself too deeply");
    }
    ++work_depth;
}

work_guard::~work_guard() {
    --work_depth;
}

void work_guard::charge(size_t n) {
    work_done += n;
    if (work_done > work_limit) {
        throw std::runtime_error("the template takes too long");
    }
}

void work_guard::reset() {
    work_done = 0;
}

void work_guard::begin_input() {
    work_done  = 0;
    work_limit = SIZE_MAX;
}

void work_guard::end_input() {
    work_limit = MAX_WORK + 300*work_done;
    work_done  = 0;
}

// without recursion: values may be nested deeper than the stack reaches
jinja::value_t::~value_t() {
    if (val_arr.empty() && val_obj.empty()) {
        return;
    }
    std::vector<value> todo;
    const auto take = [&todo](value_t & val) {
        for (auto & item : val.val_arr) {
            todo.push_back(std::move(item));
        }
        for (auto & pair : val.val_obj) {
            todo.push_back(std::move(pair.first));
            todo.push_back(std::move(pair.second));
        }
        val.val_arr.clear();
        val.val_obj.clear();
    };
    take(*this);
    while (!todo.empty()) {
        value last = std::move(todo.back());
        todo.pop_back();
        if (last && last.use_count() == 1) {
            take(*last);
        }
    }
}
