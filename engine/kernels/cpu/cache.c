/* Pages of keys and values: room, single positions, and moving a node into the text. */
#include "cache.h"

#include "platform.h"

static size_t page_size(const Cache *cache) {
    return (size_t)cache->num_layers * (size_t)cache->num_heads * PAGE_BLOCKS * cache_block_size(cache);
}

int cache_create(Cache *cache, int num_layers, int num_heads, int head_dim, int max_positions) {
    *cache = (Cache){num_layers, num_heads, head_dim, 0, (max_positions + PAGE_KEYS - 1) / PAGE_KEYS, NULL, NULL};
    cache->pages = zeroed_memory((size_t)cache->max_pages * sizeof(uint16_t *));
    return cache->pages != NULL;
}

void cache_free(Cache *cache) {
    cache_release(cache, 0);
    aligned_release(cache->pages);
    aligned_release(cache->scratch);
}

size_t cache_bytes(const Cache *cache) {
    return ((size_t)cache->num_pages + (cache->scratch != NULL)) * page_size(cache) * sizeof(uint16_t);
}

int cache_reserve(Cache *cache, int length, int with_scratch) {
    const size_t bytes = page_size(cache) * sizeof(uint16_t);
    if (length > cache->max_pages * PAGE_KEYS) return 0;
    if (with_scratch && !cache->scratch && !(cache->scratch = zeroed_memory(bytes))) return 0;
    while (cache->num_pages * PAGE_KEYS < length) {
        uint16_t *page = zeroed_memory(bytes);
        if (!page) return 0;
        cache->pages[cache->num_pages++] = page;
    }
    return 1;
}

void cache_release(Cache *cache, int length) {
    const int needed = (length + PAGE_KEYS - 1) / PAGE_KEYS;
    while (cache->num_pages > needed) aligned_release(cache->pages[--cache->num_pages]);
}

static uint16_t high_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

static float from_half(uint16_t high) {
    uint32_t bits = (uint32_t)high << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint16_t *key_at(const Cache *cache, uint16_t *block, int position) {
    const int sub = position % KEY_BLOCK / 16, lane = position % 16;
    return block + sub * 16 * cache->head_dim + 2 * lane; /* dims 2i and 2i + 1 are at + 32 i */
}

static uint16_t *value_at(const Cache *cache, uint16_t *block, int position) {
    const int pair = position % KEY_BLOCK / 2;
    return cache_values(cache, block) + pair * 2 * cache->head_dim + position % 2; /* dim d is at + 2 d */
}

void cache_put_key(const Cache *cache, uint16_t *block, int position, const float *key) {
    uint16_t *at = key_at(cache, block, position);
    for (int d = 0; d < cache->head_dim; d++) at[d / 2 * 32 + d % 2] = high_half(key[d]);
}

/* The other half of a new pair may hold a dropped row; it is cleared, as it will meet a probability of zero. */
void cache_put_value(const Cache *cache, uint16_t *block, int position, const float *value) {
    uint16_t *at = value_at(cache, block, position);
    for (int d = 0; d < cache->head_dim; d++) {
        at[2 * d] = high_half(value[d]);
        if (position % 2 == 0) at[2 * d + 1] = 0;
    }
}

void cache_get(const Cache *cache, uint16_t *block, int position, float *key, float *value) {
    const uint16_t *key_from = key_at(cache, block, position), *value_from = value_at(cache, block, position);
    for (int d = 0; d < cache->head_dim; d++) {
        key[d] = from_half(key_from[d / 2 * 32 + d % 2]);
        value[d] = from_half(value_from[2 * d]);
    }
}

static void adopt_head(Cache *cache, int layer, int head, int node, int position) {
    uint16_t *from = cache_block(cache, cache->scratch, layer, head, node);
    uint16_t *to = cache_block(cache, cache->pages[position / PAGE_KEYS], layer, head, position);
    const uint16_t *key = key_at(cache, from, node), *value = value_at(cache, from, node);
    uint16_t *new_key = key_at(cache, to, position), *new_value = value_at(cache, to, position);
    for (int i = 0; i < cache->head_dim / 2; i++) memcpy(new_key + 32 * i, key + 32 * i, 4);
    for (int d = 0; d < cache->head_dim; d++) {
        new_value[2 * d] = value[2 * d];
        if (position % 2 == 0) new_value[2 * d + 1] = 0;
    }
}

void cache_adopt(Cache *cache, int node, int position) {
    for (int layer = 0; layer < cache->num_layers; layer++)
        for (int head = 0; head < cache->num_heads; head++) adopt_head(cache, layer, head, node, position);
}
