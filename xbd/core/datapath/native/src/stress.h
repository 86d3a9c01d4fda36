/*
 * Where tests delay a thread: beside every fence, and every index or flag that two sides share.
 *
 * In what is installed a STRESS_POINT is nothing at all.  With -DXBD_STRESS it calls stress_point, which is the
 * test's (tests/native/c/delays.c): it idles there now and then, so that the two sides meet in every order.
 */
#pragma once

#ifdef XBD_STRESS

enum stress_place {
    RING_LOOK,                      /* before an index that the frontend writes is read */
    RING_TAKE,                      /* before the entry is copied */
    RING_PUSH,                      /* before rsp_prod is written */
    RING_PUSHED,                    /* before the fence */
    RING_PUSH_LOOK,                 /* before rsp_event is read */
    RING_ARM,                       /* as the last three: req_event, and req_prod once more */
    RING_ARMED,
    RING_ARM_LOOK,
    EVENT_SEND,
    EVENT_TAKE,                     /* before an event is read, so that the next one wakes again */
    EVENT_TAKEN,
    JOURNAL_MARK,
    MAIL_POST,                      /* before `mail` is written */
    MAIL_POSTED,                    /* before `sleeping` is read */
    MAIL_WAKE,
    MAIL_READ,                      /* before `mail` is cleared */
    MAIL_CLEARED,
    SLEEP_CHECK,                    /* before the final checks */
    SLEEP_SAY,                      /* before `sleeping` is written */
    SLEEP_BEGIN,                    /* before `mail` is read for the last time */
    SLEEP_END,                      /* before `sleeping` is cleared */
    KERNEL_SUBMIT,                  /* before the submission queue's tail is written */
    KERNEL_REAP,                    /* before the completion queue's tail is read */
    LIST_PUT,                       /* before something is put where Python fetches it */
    LIST_WAKE,                      /* before wake_fd is written */
    LIST_FETCH,                     /* before Python takes something */
    LIST_FETCHED,                   /* before `awake` is cleared */
    TICKET_DONE,
    EXTENTS_CHANGE,                 /* before and after the fence of a writer */
    EXTENTS_CHANGING,
    EXTENTS_CHANGED,
    EXTENTS_FIND,                   /* after the sequence was read, and before it is read again */
    EXTENTS_FOUND,
    EXTENTS_READ,                   /* between the words of an extent */
    BUDGET_TAKE,
    BUDGET_TAKING,
    BUDGET_GIVE,
    CLAIM_WRITE,                    /* before entries are written to the file */
    CLAIM_ENTER,                    /* before they are seen in memory */
    COPY_SYNC,                      /* before what was copied is made durable */
    CLAIM_COPIED,                   /* before entries are made for what was copied */
    CLAIM_PAUSE,                    /* before one looks whether entries are being made */
    STRESS_PLACES                   /* how many; a test's own places come after them */
};

void stress_point(unsigned place);

#define STRESS_POINT(place) stress_point(place)

#else

#define STRESS_POINT(place) ((void)0)

#endif
