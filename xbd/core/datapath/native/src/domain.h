/*
 * A domain's pages by its hypervisor: Xen's by libxengnttab, an embedded guest's by its memory and its table.
 */
#pragma once

#include "api_types.h"
#include "blkif.h"

/* The libraries' xengnttab_grant_copy_segment_t. */
struct grant_copy {
    union grant_place {
        void *ours;
        struct {
            uint32_t ref;
            uint16_t offset, domid;
        } theirs;
    } source, dest;
    uint16_t length, flags;
    int16_t status;
};

/* Maps pages; addresses[i] is where refs[i] is.  0, or what went wrong (an errno, or GNTST_*): then none is. */
int domain_map(const struct xbd_domain *domain, uint32_t *refs, unsigned count, bool writable, void **addresses);
/* What one call of domain_map has mapped; start: its first address. */
void domain_unmap(const struct xbd_domain *domain, void *start, unsigned count);
void domain_describe_copy(const struct xbd_domain *domain, struct grant_copy *copy, uint32_t ref, unsigned offset,
                          void *ours, unsigned length, bool to_guest);
/* Sets each copy's status.  0, or an errno: then nothing is known of any. */
int domain_copy(const struct xbd_domain *domain, struct grant_copy *copies, unsigned count);
