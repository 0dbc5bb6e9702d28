/* Picks tokens from logits. */
#ifndef SAGELLM_PICK_H
#define SAGELLM_PICK_H

/* The index of the first of the largest floats of a row; of the first NaN if there is one. */
long first_largest(const float *row, long size);

#endif
