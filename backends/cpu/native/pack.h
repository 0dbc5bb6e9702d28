/* A weight to be packed into panels. */
#ifndef SAGELLM_PACK_H
#define SAGELLM_PACK_H

typedef struct {
    const char *weight; /* [num_cols, k], contiguous; not read if it lies in a file */
    char *packed;
    long num_cols, k;
    long offset; /* of the weight in its file, in bytes */
    int kind;    /* of panel.h */
    int fd;      /* the file that holds the weight; -1: it is in memory */
} Packing;

#endif
