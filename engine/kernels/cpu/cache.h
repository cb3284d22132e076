/* Keys and values in bfloat16, in pages that are added as the text grows and never moved.
 *
 * A page holds PAGE_KEYS positions of every layer and head as blocks of 32 positions, laid out for the attention
 * kernels: keys [2][head_dim / 2][16 positions][2 dims], values [16 position pairs][head_dim][2 positions].
 * Tree nodes under verification live in one more page, the scratch page, with their node number as position.
 */
#ifndef CACHE_H
#define CACHE_H

#include <stddef.h>
#include <stdint.h>

#define KEY_BLOCK 32
#define PAGE_BLOCKS 4
#define PAGE_KEYS (KEY_BLOCK * PAGE_BLOCKS)

typedef struct {
    int num_layers, num_heads, head_dim; /* heads of keys and values */
    int num_pages, max_pages;
    uint16_t **pages;
    uint16_t *scratch; /* NULL until a tree is verified */
} Cache;

int cache_create(Cache *cache, int num_layers, int num_heads, int head_dim, int max_positions);
void cache_free(Cache *cache);
size_t cache_bytes(const Cache *cache);

/* Make room for `length` positions, and for tree nodes; 0 when memory is short. */
int cache_reserve(Cache *cache, int length, int with_scratch);

/* Release the pages that only hold positions from `length` on. */
void cache_release(Cache *cache, int length);

/* Copy a node's keys and values of all layers from the scratch page to a position. */
void cache_adopt(Cache *cache, int node, int position);

static inline size_t cache_block_size(const Cache *cache) { return (size_t)2 * KEY_BLOCK * (size_t)cache->head_dim; }

/* The block of 32 positions that holds `position`, of one layer and head. */
static inline uint16_t *cache_block(const Cache *cache, uint16_t *page, int layer, int head, int position) {
    const size_t row = (size_t)(layer * cache->num_heads + head) * PAGE_BLOCKS;
    return page + (row + (size_t)(position % PAGE_KEYS / KEY_BLOCK)) * cache_block_size(cache);
}

static inline uint16_t *cache_values(const Cache *cache, uint16_t *block) { return block + KEY_BLOCK * cache->head_dim; }

/* Store floats that are exact bfloat16 as the key or the value of a position in its block. */
void cache_put_key(const Cache *cache, uint16_t *block, int position, const float *key);
void cache_put_value(const Cache *cache, uint16_t *block, int position, const float *value);

/* Read them back. */
void cache_get(const Cache *cache, uint16_t *block, int position, float *key, float *value);

#endif
