/* The chain u_i = u_{i-1} + dt act(W_i u_{i-1} + b_i) and its adjoint, all layers in one pass over tiles of samples:
 * the serial rival of layer-parallel solves on a processor. Built by problems/benchmarks/fused.py.
 *
 * WIDTH neurons, TILE samples a tile, REAL numbers, ACT: 0 ReLU, 1 tanh, 2 SiLU. Arrays are row by row: W (layers, WIDTH,
 * WIDTH), b (layers, WIDTH), u and w (WIDTH, samples); kept (tiles, layers, WIDTH, TILE) is what the adjoint needs.
 */
#include <math.h>
#include <string.h>

#define LANES for (int t = 0; t < TILE; ++t)
#define ROWS(i) for (int i = 0; i < WIDTH; ++i)

static inline REAL sigmoid(REAL a) { return (REAL)1 / ((REAL)1 + (sizeof(REAL) == 4 ? expf(-a) : exp(-a))); }

static void load(const REAL *restrict u, int samples, int first, int count, REAL tile[restrict WIDTH][TILE])
{
    ROWS(i) LANES tile[i][t] = u[(long)i * samples + first + (t < count ? t : count - 1)];
}

void forward(const REAL *u, const REAL *restrict W, const REAL *restrict b, REAL dt, int layers, int samples,
             REAL *restrict kept, REAL *end)
{
    REAL tile[WIDTH][TILE];
    for (int first = 0; first < samples; first += TILE) {
        int count = samples - first < TILE ? samples - first : TILE;
        load(u, samples, first, count, tile);
        for (int l = 0; l < layers; ++l) {
            const REAL *Wl = W + (long)l * WIDTH * WIDTH;
            REAL (*restrict slot)[TILE] = (REAL (*)[TILE])(kept + ((long)(first / TILE) * layers + l) * WIDTH * TILE);
            ROWS(i) {
                REAL a[TILE];
                LANES a[t] = b[(long)l * WIDTH + i];
                ROWS(j) LANES a[t] += Wl[i * WIDTH + j] * tile[j][t];
                memcpy(slot[i], a, sizeof a);
            }
            ROWS(i) LANES {
                REAL a = slot[i][t];
#if ACT == 0
                REAL v = a > 0 ? a : 0;
                slot[i][t] = v;
#elif ACT == 1
                REAL v = sizeof(REAL) == 4 ? tanhf(a) : tanh(a);
                slot[i][t] = v;
#else
                REAL v = a * sigmoid(a);
#endif
                tile[i][t] += dt * v;
            }
        }
        ROWS(i) for (int t = 0; t < count; ++t) end[(long)i * samples + first + t] = tile[i][t];
    }
}

void backward(const REAL *u, const REAL *w, const REAL *restrict W, REAL dt, int layers, int samples,
              const REAL *restrict kept, REAL *restrict G, REAL *restrict g, REAL *before)
{
    REAL tile[WIDTH][TILE], cotangent[WIDTH][TILE], s[WIDTH][TILE];
    for (int first = 0; first < samples; first += TILE) {
        int count = samples - first < TILE ? samples - first : TILE;
        load(u, samples, first, count, tile);
        load(w, samples, first, count, cotangent);
        ROWS(i) for (int t = count; t < TILE; ++t) cotangent[i][t] = 0;
        for (int l = layers - 1; l >= 0; --l) {
            const REAL *Wl = W + (long)l * WIDTH * WIDTH;
            REAL *Gl = G + (long)l * WIDTH * WIDTH;
            const REAL (*slot)[TILE] = (const REAL (*)[TILE])(kept + ((long)(first / TILE) * layers + l) * WIDTH * TILE);
            ROWS(i) LANES {
                REAL v = slot[i][t];
#if ACT == 0
                s[i][t] = v > 0 ? cotangent[i][t] : 0;
#elif ACT == 1
                s[i][t] = cotangent[i][t] * (1 - v * v);
#else
                REAL sigma = sigmoid(v);
                s[i][t] = cotangent[i][t] * sigma * (1 + v * (1 - sigma));
                v *= sigma;
#endif
                tile[i][t] -= dt * v;
            }
            ROWS(i) {
                REAL sum = 0;
                LANES sum += s[i][t];
                g[(long)l * WIDTH + i] += dt * sum;
                ROWS(j) {
                    REAL product = 0;
                    LANES product += s[i][t] * tile[j][t];
                    Gl[i * WIDTH + j] += dt * product;
                }
            }
            ROWS(j) {
                REAL sum[TILE];
                memset(sum, 0, sizeof sum);
                ROWS(i) LANES sum[t] += Wl[i * WIDTH + j] * s[i][t];
                LANES cotangent[j][t] += dt * sum[t];
            }
        }
        ROWS(i) for (int t = 0; t < count; ++t) before[(long)i * samples + first + t] = cotangent[i][t];
    }
}
