#include "llama-kv-victim.h"

#include <set>
#include <utility>

uint64_t llama_kv_draw(uint64_t x) {
    uint64_t z = (x + 1)*0x9e3779b97f4a7c15ull;

    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27))*0x94d049bb133111ebull;

    return z ^ (z >> 31);
}

namespace {

class victim_random : public llama_kv_victim {
public:
    std::unique_ptr<llama_kv_victim> clone() const override { return std::make_unique<victim_random>(*this); }

    void clear() override { order.clear(); }

    void add   (uint32_t slot, int32_t pos) override { order.insert({ llama_kv_draw((uint64_t) pos), slot }); }
    void remove(uint32_t slot, int32_t pos) override { order.erase ({ llama_kv_draw((uint64_t) pos), slot }); }

    uint32_t next() const override { return order.begin()->second; }

private:
    std::set<std::pair<uint64_t, uint32_t>> order;
};

}

std::unique_ptr<llama_kv_victim> llama_kv_victim_random() {
    return std::make_unique<victim_random>();
}
