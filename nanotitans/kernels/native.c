/*
The long-term memory on a CPU, token by token: recurrence(), short_conv(), recall() and join() of
blocks.py, forward and backward, in float32 and float64. native.py compiles this file once and calls
it. The file includes itself, once for each precision.

Output i of a linear memory depends on row i of M and on no other row; the rows share only keys,
queries and gates. So the rows are cut into tiles of TILE, and each tile runs over all tokens by
itself, with its part of M and S in the first-level cache. A tile is stored transposed, [j][i]: M k
is then a sum of rows of the tile, each a few vectors long; nothing is summed across a vector.

A task is one row of the batch, one head and, in the recurrence, one tile. Threads divide the tasks
among them and never share a sum, so the bits depend neither on the number of threads nor on where a
text is cut into calls.

Layout: tokens (B, T, H, D), with D contiguous and any other strides; gates (B, T, 3, H): theta,
eta, alpha; M and S (B, H, D, D), a row for each output.

g_x is the gradient of the outer loss by x.
*/
#ifndef REAL
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

typedef void task_function(const void *arguments, long task, void *scratch);
typedef struct {
    task_function *function;
    const void *arguments;
    long tasks, thread, threads, scratch_size;
    char *scratch;
} share;

static void *run_share(void *given) {
    const share *s = given;
    for (long task = s->thread; task < s->tasks; task += s->threads)
        s->function(s->arguments, task, s->scratch + s->thread * s->scratch_size);
    return 0;
}

/* Run all tasks on `threads` threads, of which this is one. If a thread cannot be started, this one
   does its share. */
static void run_tasks(task_function *function, const void *arguments, long tasks, long threads,
                      void *scratch, long size) {
    if (threads > tasks) threads = tasks;
    if (threads > 64) threads = 64;
    share shares[64];
    pthread_t started[64];
    int running[64];
    for (long i = 0; i < threads; i++)
        shares[i] = (share){function, arguments, tasks, i, threads, size, scratch};
    for (long i = 1; i < threads; i++)
        running[i] = !pthread_create(&started[i], 0, run_share, &shares[i]);
    if (threads > 0) run_share(&shares[0]);
    for (long i = 1; i < threads; i++) {
        if (running[i]) pthread_join(started[i], 0);
        else run_share(&shares[i]);
    }
}

/* Tokens (B, T, H, D): the address of the first number, and the strides of row, token and head */
typedef struct { const void *at; long row, token, head; } tokens;

#define BYTES 64   /* of a vector */
#define WIDTH 2    /* vectors in a row of a tile */
#define EVERY 16   /* the forward keeps a state before every EVERY-th token, for the backward */
#define INLINE static inline __attribute__((always_inline))

#define REAL float
#define INT int32_t
#define LANES 16
#define NAME(x) x##_float32
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define MANTISSA 23
#define TERMS 7    /* of the series of exp: enough for the precision */
#define FACTORIAL 5040.0
#include __FILE__
#undef REAL
#undef INT
#undef LANES
#undef NAME
#undef EVENS
#undef ODDS
#undef MANTISSA
#undef TERMS
#undef FACTORIAL
#define REAL double
#define INT int64_t
#define LANES 8
#define NAME(x) x##_float64
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define MANTISSA 52
#define TERMS 13
#define FACTORIAL 6227020800.0
#include __FILE__

/* What native.py needs to allocate memory: the rows of M in one tile, and EVERY */
void sizes(long *tile_float32, long *tile_float64, long *every) {
    *tile_float32 = WIDTH * 16, *tile_float64 = WIDTH * 8, *every = EVERY;
}
#else

typedef REAL NAME(vector) __attribute__((vector_size(BYTES)));
typedef INT NAME(whole) __attribute__((vector_size(BYTES)));
#define vector NAME(vector)
#define whole NAME(whole)
#define TILE (WIDTH * LANES)
#define ROW(x, j, u) ((x)[(j) * WIDTH + (u)])

/* Load n numbers into WIDTH vectors; the rest of the vectors is 0 */
INLINE void NAME(load)(vector *to, const REAL *from, long n) {
    if (n == TILE) { memcpy(to, from, sizeof(vector) * WIDTH); return; }
    memset(to, 0, sizeof(vector) * WIDTH);
    memcpy(to, from, sizeof(REAL) * n);
}
INLINE void NAME(store)(REAL *to, const vector *from, long n) {
    if (n == TILE) memcpy(to, from, sizeof(vector) * WIDTH);
    else memcpy(to, from, sizeof(REAL) * n);
}
INLINE REAL NAME(sum)(vector x) {
    REAL a[LANES];
    memcpy(a, &x, sizeof a);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}

/* The sums of LANES vectors, as one vector. Overwrites x. */
INLINE vector NAME(sums)(vector *x) {
    for (int n = LANES; n > 1; n /= 2)
        for (int i = 0; i < n / 2; i++)
            x[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], EVENS)
                   + __builtin_shufflevector(x[2 * i], x[2 * i + 1], ODDS);
    return x[0];
}

/* The sum over j < D of a[j] * m[j]. Four partial sums: no addition waits for the one before. */
INLINE void NAME(product)(long D, const vector *m, const REAL *a, vector *out) {
    vector part[4][WIDTH];
    memset(part, 0, sizeof part);
    long j = 0;
    for (; j + 3 < D; j += 4)
        for (int p = 0; p < 4; p++)
            for (int u = 0; u < WIDTH; u++) part[p][u] += a[j + p] * ROW(m, j + p, u);
    for (; j < D; j++)
        for (int u = 0; u < WIDTH; u++) part[0][u] += a[j] * ROW(m, j, u);
    for (int u = 0; u < WIDTH; u++) out[u] = (part[0][u] + part[1][u]) + (part[2][u] + part[3][u]);
}

/* Copy n rows of a (D, D) matrix into a tile, transposed to [j][i], and back */
INLINE void NAME(take)(long D, vector *to, const REAL *from, long n) {
    for (long j = 0; j < D; j++) {
        REAL row[TILE] = {0};
        for (long i = 0; i < n; i++) row[i] = from[i * D + j];
        memcpy(&ROW(to, j, 0), row, sizeof row);
    }
}
INLINE void NAME(put)(long D, REAL *to, const vector *from, long n) {
    for (long j = 0; j < D; j++) {
        REAL row[TILE];
        memcpy(row, &ROW(from, j, 0), sizeof row);
        for (long i = 0; i < n; i++) to[i * D + j] = row[i];
    }
}

/* ---- the recurrence ---- */

typedef struct {
    long B, T, H, D, tiles;
    tokens q, k, v, g_y;
    const REAL *gates, *M, *S;            /* (B, T, 3, H), (B, H, D, D); S is 0 without momentum */
    REAL *y, *d, *M_after, *S_after;      /* (B, T, H, D), (B, H, D, D) */
    REAL *kept;                           /* states for the backward, task after task; or 0 */
    const REAL *g_M, *g_S;                /* of M_after and S_after */
    REAL *g_q, *g_k, *g_gates;            /* (tiles, B, T, H, D), (tiles, B, T, 3, H) */
    REAL *g_v, *g_M_before, *g_S_before;
} NAME(recurrence);

/* What a task works on: row b of the batch, head h, the n rows of M from i0 on */
#define PLACE \
    const NAME(recurrence) *a = given; \
    const long D = a->D, H = a->H, T = a->T, tile = task % a->tiles, h = task / a->tiles % H, \
               b = task / a->tiles / H; \
    const long i0 = tile * TILE, n = D - i0 < TILE ? D - i0 : TILE, block = D * WIDTH, \
               states = (T + EVERY - 1) / EVERY; \
    const long corner = ((b * H + h) * D + i0) * D; \
    vector *kept = (vector *)a->kept; \
    (void)kept, (void)states, (void)block;
#define AT(x, t) ((const REAL *)a->x.at + b * a->x.row + (t) * a->x.token + h * a->x.head)
#define FLAT(t) ((b * T + (t)) * H + h)
#define GATES *gates = a->gates + (b * T + t) * 3 * H + h, theta = gates[0], eta = gates[H], \
              alpha = gates[2 * H]

/* A tile is M and S, or M alone without momentum: then P is the token's own step, and all of it is
   written. d is the error 2 (M k - v). */
INLINE void NAME(forward_tile)(const void *given, long task, void *scratch, const int momentum) {
    PLACE
    const long size = (1 + momentum) * block;
    vector *M = scratch, *S = M + block, c[WIDTH], d[WIDTH], v[WIDTH], y[WIDTH];
    kept += a->kept ? task * states * size : 0;
    NAME(take)(D, M, a->M + corner, n);
    if (momentum) NAME(take)(D, S, a->S + corner, n);
    for (long t = 0; t < T; t++) {
        const REAL *k = AT(k, t), *q = AT(q, t), GATES;
        const REAL keep = 1 - alpha, now = keep * (1 - eta), later = keep * eta;
        if (a->kept && t % EVERY == 0) memcpy(kept + t / EVERY * size, M, sizeof(vector) * size);
        NAME(load)(v, AT(v, t) + i0, n);
        NAME(product)(D, M, k, d);
        for (int u = 0; u < WIDTH; u++)
            d[u] = 2 * (d[u] - v[u]), c[u] = (momentum ? -theta : -theta * keep) * d[u];
        for (long j = 0; j < D; j++)
            for (int u = 0; u < WIDTH; u++) {
                if (momentum) {
                    vector p = ROW(S, j, u) + k[j] * c[u];
                    ROW(M, j, u) = keep * ROW(M, j, u) + now * p;
                    ROW(S, j, u) = later * p;
                } else {
                    ROW(M, j, u) = keep * ROW(M, j, u) + k[j] * c[u];
                }
            }
        NAME(product)(D, M, q, y);
        NAME(store)(a->y + FLAT(t) * D + i0, y, n);
        if (a->d) NAME(store)(a->d + FLAT(t) * D + i0, d, n);
    }
    NAME(put)(D, a->M_after + corner, M, n);
    if (momentum) NAME(put)(D, a->S_after + corner, S, n);
}

/* For each kept state, the last first: recompute the tokens after it, then go back through them. */
INLINE void NAME(backward_tile)(const void *given, long task, void *scratch, const int momentum) {
    PLACE
    const long size = (1 + momentum) * block, plane = tile * a->B * T * H;
    /* again: M and P of each token after the kept state, computed again */
    vector *g_M = scratch, *g_S = g_M + block, *again = g_M + size;
    kept += task * states * size;
    NAME(take)(D, g_M, a->g_M + corner, n);
    if (momentum) NAME(take)(D, g_S, a->g_S + corner, n);
    for (long begin = (states - 1) * EVERY; begin >= 0; begin -= EVERY) {
        const long end = begin + EVERY < T ? begin + EVERY : T;
        const vector *first = kept + begin / EVERY * size, *M = first, *S = first + block;
        REAL pending = 1;  /* the surprise is `pending` times the numbers that S points to */
        for (long t = begin; t < end; t++) {
            const REAL *k = AT(k, t), GATES;
            const REAL keep = 1 - alpha, now = keep * (1 - eta);
            vector d[WIDTH], *M_t = again + (t - begin) * size, *P_t = M_t + block;
            NAME(load)(d, a->d + FLAT(t) * D + i0, n);
            for (int u = 0; u < WIDTH; u++) d[u] *= momentum ? -theta : -theta * keep;
            for (long j = 0; j < D; j++)
                for (int u = 0; u < WIDTH; u++) {
                    if (momentum) {
                        vector p = pending * ROW(S, j, u) + k[j] * d[u];
                        ROW(P_t, j, u) = p;
                        ROW(M_t, j, u) = keep * ROW(M, j, u) + now * p;
                    } else {
                        ROW(M_t, j, u) = keep * ROW(M, j, u) + k[j] * d[u];
                    }
                }
            M = M_t, S = P_t, pending = keep * eta;
        }
        for (long t = end - 1; t >= begin; t--) {
            const REAL *k = AT(k, t), *q = AT(q, t), GATES;
            const REAL keep = 1 - alpha, now = keep * (1 - eta), later = keep * eta;
            const vector *M_t = again + (t - begin) * size, *P_t = M_t + block,
                         *M = t > begin ? M_t - size : first;
            /* e: the gradient by P_t, times k */
            vector d[WIDTH], g_y[WIDTH], e[WIDTH], c[WIDTH], part[LANES] = {0};
            vector of_keep = {0}, of_now = {0}, of_later = {0}, of_theta = {0};
            REAL *g_q = a->g_q + (plane + FLAT(t)) * D, *g_k = a->g_k + (plane + FLAT(t)) * D;
            REAL *g_gates = a->g_gates + (plane + (b * T + t) * H) * 3 + h;
            NAME(load)(d, a->d + FLAT(t) * D + i0, n);
            NAME(load)(g_y, AT(g_y, t) + i0, n);
            memset(e, 0, sizeof e);
            for (long j0 = 0; j0 < D; j0 += LANES) {
                const long m = D - j0 < LANES ? D - j0 : LANES;
                for (long j = j0; j < j0 + m; j++) {
                    vector x = {0};
                    for (int u = 0; u < WIDTH; u++) {
                        vector g = ROW(g_M, j, u) + q[j] * g_y[u];
                        x += ROW(M_t, j, u) * g_y[u];
                        of_keep += g * ROW(M, j, u);
                        if (momentum) {
                            vector s = ROW(g_S, j, u), p = ROW(P_t, j, u);
                            of_now += g * p, of_later += s * p;
                            s = now * g + later * s;  /* the gradient by P_t */
                            e[u] += k[j] * s;
                            ROW(g_S, j, u) = s;
                        } else {
                            e[u] += k[j] * g;
                        }
                        ROW(g_M, j, u) = keep * g;
                    }
                    part[j - j0] = x;
                }
                vector x = NAME(sums)(part);
                memcpy(g_q + j0, &x, sizeof(REAL) * m);
            }
            for (int u = 0; u < WIDTH; u++) {
                if (!momentum) of_now -= theta * e[u] * d[u], e[u] *= keep;
                of_theta -= e[u] * d[u], c[u] = -2 * theta * e[u], d[u] *= -theta;
            }
            const vector *g_P = momentum ? g_S : g_M;
            for (long j0 = 0; j0 < D; j0 += LANES) {
                const long m = D - j0 < LANES ? D - j0 : LANES;
                for (long j = j0; j < j0 + m; j++) {
                    vector x = {0};
                    for (int u = 0; u < WIDTH; u++) {
                        x += ROW(M, j, u) * c[u] + ROW(g_P, j, u) * d[u];
                        ROW(g_M, j, u) += k[j] * c[u];
                    }
                    part[j - j0] = x;
                }
                vector x = NAME(sums)(part);
                memcpy(g_k + j0, &x, sizeof(REAL) * m);
            }
            for (int u = 0; u < WIDTH; u++) c[u] = -c[u];
            NAME(store)(a->g_v + FLAT(t) * D + i0, c, n);
            const REAL x = NAME(sum)(of_keep), y = NAME(sum)(of_now), z = NAME(sum)(of_later);
            g_gates[0] = NAME(sum)(of_theta), g_gates[H] = momentum ? keep * (z - y) : 0;
            g_gates[2 * H] = momentum ? -(x + (1 - eta) * y + eta * z) : -(x + y);
        }
    }
    NAME(put)(D, a->g_M_before + corner, g_M, n);
    if (momentum) NAME(put)(D, a->g_S_before + corner, g_S, n);
}

static void NAME(forward_M)(const void *a, long task, void *scratch) {
    NAME(forward_tile)(a, task, scratch, 0);
}
static void NAME(forward_M_S)(const void *a, long task, void *scratch) {
    NAME(forward_tile)(a, task, scratch, 1);
}
static void NAME(backward_M)(const void *a, long task, void *scratch) {
    NAME(backward_tile)(a, task, scratch, 0);
}
static void NAME(backward_M_S)(const void *a, long task, void *scratch) {
    NAME(backward_tile)(a, task, scratch, 1);
}

void NAME(recurrence_forward)(const NAME(recurrence) *a, long threads, void *scratch, long size) {
    run_tasks(a->S ? NAME(forward_M_S) : NAME(forward_M), a, a->B * a->H * a->tiles, threads,
              scratch, size);
}
void NAME(recurrence_backward)(const NAME(recurrence) *a, long threads, void *scratch, long size) {
    run_tasks(a->g_S ? NAME(backward_M_S) : NAME(backward_M), a, a->B * a->H * a->tiles, threads,
              scratch, size);
}

/* ---- recall: y_t = M q_t, with the same M for all tokens ---- */

static void NAME(recall_tile)(const void *given, long task, void *scratch) {
    PLACE
    vector *M = scratch, y[WIDTH];
    NAME(take)(D, M, a->M + corner, n);
    for (long t = 0; t < T; t++) {
        NAME(product)(D, M, AT(q, t), y);
        NAME(store)(a->y + FLAT(t) * D + i0, y, n);
    }
}

static void NAME(recall_back_tile)(const void *given, long task, void *scratch) {
    PLACE
    vector *M = scratch, *g_M = M + block, g_y[WIDTH], part[LANES] = {0};
    NAME(take)(D, M, a->M + corner, n);
    memset(g_M, 0, sizeof(vector) * block);
    for (long t = 0; t < T; t++) {
        const REAL *q = AT(q, t);
        REAL *g_q = a->g_q + (tile * a->B * T * H + FLAT(t)) * D;
        NAME(load)(g_y, AT(g_y, t) + i0, n);
        for (long j0 = 0; j0 < D; j0 += LANES) {
            const long m = D - j0 < LANES ? D - j0 : LANES;
            for (long j = j0; j < j0 + m; j++) {
                vector x = {0};
                for (int u = 0; u < WIDTH; u++)
                    x += ROW(M, j, u) * g_y[u], ROW(g_M, j, u) += q[j] * g_y[u];
                part[j - j0] = x;
            }
            vector x = NAME(sums)(part);
            memcpy(g_q + j0, &x, sizeof(REAL) * m);
        }
    }
    NAME(put)(D, a->g_M_before + corner, g_M, n);
}

void NAME(recall_forward)(const NAME(recurrence) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(recall_tile), a, a->B * a->H * a->tiles, threads, scratch, size);
}
void NAME(recall_backward)(const NAME(recurrence) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(recall_back_tile), a, a->B * a->H * a->tiles, threads, scratch, size);
}

/* ---- short_conv: convolution over the last K tokens, SiLU, unit length for `units` heads ---- */

typedef struct {
    long B, T, H, D, tiles, K, units;
    REAL least;                           /* shorter vectors are divided by this */
    tokens x, g_y;                        /* (B, T, H, D) */
    const REAL *tail,                     /* the K-1 tokens before x (B, K-1, H, D) */
               *taps;                     /* (H, D, K), or 0 for no convolution: K = 1, taps 1 */
    REAL *y, *g_x, *g_tail, *g_taps;      /* g_taps (B, H, D, K) */
} NAME(conv);

/* e^x, precise to the last bits; x is clamped to +-80. x = n ln 2 + r, and e^r is a series. */
INLINE vector NAME(exponential)(vector x) {
    whole low = x < -80, high = x > 80;
    const vector end = (vector){0} + 80;
    x = (vector)(((whole)-end & low) | ((whole)end & high) | ((whole)x & ~(low | high)));
    const REAL magic = 1.5 * ((INT)1 << MANTISSA);
    vector n = (x * (REAL)1.4426950408889634 + magic) - magic;
    vector r = (x - n * (REAL)0.693145751953125) - n * (REAL)1.42860682030941723212e-6,
           s = (vector){0} + (REAL)(1 / FACTORIAL);
    REAL factor = 1 / FACTORIAL;
    for (int i = TERMS; i > 0; i--) factor *= i, s = s * r + factor;
    whole two_to_n = (__builtin_convertvector(n, whole)
                      + (((INT)1 << (sizeof(REAL) * 8 - 2 - MANTISSA)) - 1)) << MANTISSA;
    return s * (vector)two_to_n;
}

#define CONV \
    const NAME(conv) *a = given; \
    const long D = a->D, H = a->H, T = a->T, K = a->K, h = task % H, b = task / H, \
               wide = a->tiles * WIDTH; \
    const REAL *tail = a->tail + (b * (K - 1) * H + h) * D; \
    vector *taps = scratch, *c = taps + K * wide, *s = c + wide; /* taps [K][wide] */ \
    memset(taps, 0, sizeof(vector) * K * wide); \
    for (long i = 0; i < D; i++) \
        for (long j = 0; j < K; j++) \
            ((REAL *)(taps + j * wide))[i] = a->taps ? a->taps[(h * D + i) * K + j] : 1;
#define INPUT(t) ((t) < 0 ? tail + ((t) + K - 1) * H * D : AT(x, t))
#define TILES long i0 = 0, p = 0, n; n = D - i0 < TILE ? D - i0 : TILE, i0 < D; \
              i0 += TILE, p += WIDTH

/* c: the convolution at token t; s: its sigmoid; length: of c s, the SiLU of c */
#define ACTIVATE(t) \
    vector squares = {0}; \
    for (TILES) { \
        vector x[WIDTH], sum[WIDTH] = {0}; \
        for (long j = 0; j < K; j++) { \
            NAME(load)(x, INPUT((t) - K + 1 + j) + i0, n); \
            for (int u = 0; u < WIDTH; u++) sum[u] += taps[j * wide + p + u] * x[u]; \
        } \
        for (int u = 0; u < WIDTH; u++) { \
            vector sigmoid = 1 / (1 + NAME(exponential)(-sum[u])), silu = sum[u] * sigmoid; \
            c[p + u] = sum[u], s[p + u] = sigmoid, squares += silu * silu; \
        } \
    } \
    const REAL length = h < a->units ? sqrt(NAME(sum)(squares)) : 1, \
               scale = 1 / (length > a->least ? length : a->least);

static void NAME(conv_head)(const void *given, long task, void *scratch) {
    CONV
    for (long t = 0; t < T; t++) {
        ACTIVATE(t)
        for (TILES) {
            vector y[WIDTH];
            for (int u = 0; u < WIDTH; u++) y[u] = c[p + u] * s[p + u] * (h < a->units ? scale : 1);
            NAME(store)(a->y + FLAT(t) * D + i0, y, n);
        }
    }
}

static void NAME(conv_back_head)(const void *given, long task, void *scratch) {
    CONV
    /* g_c has K tokens: token t is at t % K */
    vector *g_taps = s + wide, *g_c = g_taps + K * wide, *g_y = g_c + K * wide;
    memset(g_taps, 0, sizeof(vector) * 2 * K * wide);
    for (long t = T - 1; t > -K; t--) {
        vector *g_t = g_c + ((t + K) % K) * wide;
        if (t >= 0) {
            ACTIVATE(t)
            vector dots = {0};
            for (TILES) {
                NAME(load)(g_y + p, AT(g_y, t) + i0, n);
                for (int u = 0; u < WIDTH; u++) dots += g_y[p + u] * c[p + u] * s[p + u];
            }
            const REAL dot = h < a->units && length > a->least ? NAME(sum)(dots) * scale * scale
                                                               : 0;
            for (TILES) {
                for (int u = 0; u < WIDTH; u++) {
                    vector g = g_y[p + u];
                    if (h < a->units) g = (g - c[p + u] * s[p + u] * dot) * scale;
                    g_t[p + u] = g * s[p + u] * (1 + c[p + u] * (1 - s[p + u]));
                }
                for (long j = 0; j < K; j++) {
                    vector x[WIDTH];
                    NAME(load)(x, INPUT(t - K + 1 + j) + i0, n);
                    for (int u = 0; u < WIDTH; u++) g_taps[j * wide + p + u] += g_t[p + u] * x[u];
                }
            }
        } else {
            memset(g_t, 0, sizeof(vector) * wide);
        }
        REAL *g_x = t >= 0 ? a->g_x + FLAT(t) * D
                           : a->g_tail + ((b * (K - 1) + t + K - 1) * H + h) * D;
        for (TILES) {
            vector g[WIDTH] = {0};
            for (long j = 0; j < K && t + j < T; j++)
                for (int u = 0; u < WIDTH; u++)
                    g[u] += taps[(K - 1 - j) * wide + p + u]
                            * g_c[((t + j + K) % K) * wide + p + u];
            NAME(store)(g_x + i0, g, n);
        }
    }
    for (long i = 0; i < D && a->taps; i++)
        for (long j = 0; j < K; j++)
            a->g_taps[((b * H + h) * D + i) * K + j] = ((REAL *)(g_taps + j * wide))[i];
}

void NAME(conv_forward)(const NAME(conv) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(conv_head), a, a->B * a->H, threads, scratch, size);
}
void NAME(conv_backward)(const NAME(conv) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(conv_back_head), a, a->B * a->H, threads, scratch, size);
}

/* ---- join: z = y / sqrt(1 + mean y^2) gain_0 + sqrt(D) q gain_1 ---- */

typedef struct {
    long B, T, H, D, tiles;
    tokens y, q, g_z;
    const REAL *gains;                    /* (2, H, D) */
    REAL *z, *g_y, *g_q, *g_gains;        /* (B, T, H, D); g_gains (B, 2, H, D) */
} NAME(join);

#define JOIN \
    const NAME(join) *a = given; \
    const long D = a->D, H = a->H, T = a->T, h = task % H, b = task / H; \
    const REAL *gains[2] = {a->gains + h * D, a->gains + (H + h) * D}, root = sqrt(D);
#define BOUND(t) \
    vector squares = {0}, y[WIDTH], q[WIDTH], g0[WIDTH], g1[WIDTH]; \
    for (TILES) { \
        NAME(load)(y, AT(y, t) + i0, n); \
        for (int u = 0; u < WIDTH; u++) squares += y[u] * y[u]; \
    } \
    const REAL scale = 1 / sqrt(1 + NAME(sum)(squares) / D);
#define LOAD(t) \
    NAME(load)(y, AT(y, t) + i0, n), NAME(load)(q, AT(q, t) + i0, n), \
    NAME(load)(g0, gains[0] + i0, n), NAME(load)(g1, gains[1] + i0, n);

static void NAME(join_head)(const void *given, long task, void *scratch) {
    JOIN
    (void)scratch;
    for (long t = 0; t < T; t++) {
        BOUND(t)
        for (TILES) {
            LOAD(t)
            for (int u = 0; u < WIDTH; u++) y[u] = y[u] * scale * g0[u] + root * q[u] * g1[u];
            NAME(store)(a->z + FLAT(t) * D + i0, y, n);
        }
    }
}

static void NAME(join_back_head)(const void *given, long task, void *scratch) {
    JOIN
    vector *g_gains = scratch, g[WIDTH];
    memset(g_gains, 0, sizeof(vector) * 2 * a->tiles * WIDTH);
    for (long t = 0; t < T; t++) {
        BOUND(t)
        vector dots = {0};
        for (TILES) {
            LOAD(t)
            NAME(load)(g, AT(g_z, t) + i0, n);
            for (int u = 0; u < WIDTH; u++) {
                dots += g[u] * g0[u] * y[u];
                g_gains[p + u] += g[u] * y[u] * scale;
                g_gains[a->tiles * WIDTH + p + u] += root * g[u] * q[u];
                g1[u] *= root * g[u];
            }
            NAME(store)(a->g_q + FLAT(t) * D + i0, g1, n);
        }
        const REAL dot = NAME(sum)(dots) * scale * scale / D;
        for (TILES) {
            LOAD(t)
            NAME(load)(g, AT(g_z, t) + i0, n);
            for (int u = 0; u < WIDTH; u++) g[u] = (g[u] * g0[u] - y[u] * dot) * scale;
            NAME(store)(a->g_y + FLAT(t) * D + i0, g, n);
        }
    }
    for (int i = 0; i < 2; i++)
        memcpy(a->g_gains + ((b * 2 + i) * H + h) * D, g_gains + i * a->tiles * WIDTH,
               sizeof(REAL) * D);
}

void NAME(join_forward)(const NAME(join) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(join_head), a, a->B * a->H, threads, scratch, size);
}
void NAME(join_backward)(const NAME(join) *a, long threads, void *scratch, long size) {
    run_tasks(NAME(join_back_head), a, a->B * a->H, threads, scratch, size);
}

/* ---- step: short_conv, recurrence and join of one generated token in a single call ---- */

/* x (B, 1, 3H, D): the projected token; mixed as x; y, z (B, 1, H, D); all contiguous. */
void NAME(step)(long B, long H, long D, long tiles, long K, double least, const REAL *x,
                const REAL *tail, const REAL *taps, const REAL *gates, const REAL *M, const REAL *S,
                const REAL *gains, REAL *mixed, REAL *y, REAL *z, REAL *M_after, REAL *S_after,
                void *scratch) {
    const tokens given = {x, 3 * H * D, 3 * H * D, D}, q = {mixed, 3 * H * D, 3 * H * D, D};
    const tokens k = {mixed + H * D, q.row, q.token, D}, v = {mixed + 2 * H * D, q.row, q.token, D},
                 read = {y, H * D, H * D, D};
    const NAME(conv) c = {.B = B, .T = 1, .H = 3 * H, .D = D, .tiles = tiles, .K = K,
                          .units = 2 * H, .least = least, .x = given, .tail = tail, .taps = taps,
                          .y = mixed};
    const NAME(recurrence) r = {.B = B, .T = 1, .H = H, .D = D, .tiles = tiles, .q = q, .k = k,
                                .v = v, .gates = gates, .M = M, .S = S, .y = y, .M_after = M_after,
                                .S_after = S_after};
    const NAME(join) j = {.B = B, .T = 1, .H = H, .D = D, .tiles = tiles, .y = read, .q = q,
                          .gains = gains, .z = z};
    NAME(conv_forward)(&c, 1, scratch, 0);
    NAME(recurrence_forward)(&r, 1, scratch, 0);
    NAME(join_forward)(&j, 1, scratch, 0);
}
#undef vector
#undef whole
#undef TILE
#undef ROW
#undef PLACE
#undef AT
#undef FLAT
#undef GATES
#undef CONV
#undef INPUT
#undef TILES
#undef ACTIVATE
#undef JOIN
#undef BOUND
#undef LOAD
#endif
