//! Replies on their way to a client: gathered while a send is under way, then sent together by the next one.

use std::collections::VecDeque;

use block::{Buf, Pool};

/// Heads of replies are written side by side into blocks of this many bytes.
const BLOCK_LEN: usize = 4096;
/// A batch of this many bytes takes no further reply: what it holds is freed when all of it is sent.
const BATCH_LEN: usize = 1 << 20;

/// Replies that are sent together, and the table's entries that are free when they are sent.
#[derive(Default)]
pub(crate) struct Batch {
    pieces: Vec<Buf>,
    entries: Vec<usize>,
    len: usize,
}

impl Batch {
    /// All its bytes as one buffer; there is at least one reply in it.
    pub(crate) fn into_parts(mut self) -> (Buf, Vec<usize>) {
        let buf = match self.pieces.len() {
            1 => self.pieces.swap_remove(0),
            _ => Buf::concat(self.pieces),
        };
        (buf, self.entries)
    }
}

/// What waits to be sent.
pub(crate) struct Outbox {
    pool: Pool,
    batches: VecDeque<Batch>,
    /// Where the next head goes, and the bytes of it that are used.
    block: Option<(Buf, usize)>,
    /// The first byte of the block that belongs to no piece yet: heads without payloads between them are one piece.
    open: usize,
    /// Empty vectors to be used again.
    spare: Vec<usize>,
}

impl Outbox {
    pub(crate) fn new(pool: Pool) -> Outbox {
        Outbox { pool, batches: VecDeque::new(), block: None, open: 0, spare: Vec::new() }
    }

    /// Adds a reply, and its payload if it has one. `entry` is the table's entry that is free when it is sent.
    pub(crate) fn push(&mut self, head: &[u8], payload: Option<Buf>, entry: usize) {
        if self.batches.back().is_none_or(|batch| batch.len >= BATCH_LEN) {
            self.close();
            let entries = std::mem::take(&mut self.spare);
            self.batches.push_back(Batch { entries, ..Batch::default() });
        }
        self.put(head);
        let payload_len = payload.as_ref().map_or(0, Buf::len);
        if let Some(payload) = payload {
            self.close();
            if let Some(batch) = self.batches.back_mut() {
                batch.pieces.push(payload);
            }
        }
        if let Some(batch) = self.batches.back_mut() {
            batch.entries.push(entry);
            batch.len += head.len() + payload_len;
        }
    }

    /// The replies that are to be sent next.
    pub(crate) fn take(&mut self) -> Option<Batch> {
        if self.batches.len() == 1 {
            self.close();
        }
        self.batches.pop_front()
    }

    /// Takes back a vector that a batch was made of.
    pub(crate) fn reuse(&mut self, mut entries: Vec<usize>) {
        entries.clear();
        self.spare = entries;
    }

    /// Forgets everything; the entries of the table that are free now.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = usize> {
        self.block = None;
        self.open = 0;
        std::mem::take(&mut self.batches).into_iter().flat_map(|batch| batch.entries)
    }

    fn put(&mut self, head: &[u8]) {
        if self.block.as_ref().is_some_and(|(_, used)| BLOCK_LEN - used < head.len()) {
            self.close();
            self.block = None;
            self.open = 0;
        }
        let (block, used) = self.block.get_or_insert_with(|| (self.pool.take(BLOCK_LEN), 0));
        // A send of bytes before these may be under way: the kernel reads only the pieces that it was given.
        block.put(*used, head);
        *used += head.len();
    }

    /// Ends the piece that heads are added to.
    fn close(&mut self) {
        if let (Some((block, used)), Some(batch)) = (&self.block, self.batches.back_mut())
            && *used > self.open
        {
            batch.pieces.push(block.slice(self.open, used - self.open));
            self.open = *used;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox() -> Outbox {
        Outbox::new(Pool::new(64 << 10))
    }

    #[test]
    fn replies_leave_in_their_order_and_heads_are_gathered() {
        let mut outbox = outbox();
        for (entry, head) in [b"one ", b"two "].iter().enumerate() {
            outbox.push(*head, None, entry);
        }
        outbox.push(b"read ", Some(Buf::from_bytes(b"bytes ")), 7);
        outbox.push(b"end", None, 8);
        let (buf, entries) = outbox.take().unwrap().into_parts();
        assert_eq!(buf.to_vec(), b"one two read bytes end");
        assert_eq!(buf.segments().len(), 3);
        assert_eq!(entries, [0, 1, 7, 8]);
        assert!(outbox.take().is_none());
    }

    #[test]
    fn what_is_added_during_a_send_leaves_what_is_being_sent_alone() {
        let mut outbox = outbox();
        outbox.push(b"first", None, 0);
        let (first, entries) = outbox.take().unwrap().into_parts();
        outbox.reuse(entries);
        outbox.push(b"second", None, 0);
        let (second, entries) = outbox.take().unwrap().into_parts();
        assert_eq!((first.to_vec(), second.to_vec()), (b"first".to_vec(), b"second".to_vec()));
        assert_eq!(entries, [0]);
    }

    #[test]
    fn any_number_of_heads_fits() {
        let mut outbox = outbox();
        let mut expected = Vec::new();
        for entry in 0..1000 {
            let head = format!("head {entry:-<55}");
            outbox.push(head.as_bytes(), None, entry);
            expected.extend(head.into_bytes());
        }
        assert_eq!(outbox.take().unwrap().into_parts().0.to_vec(), expected);
    }

    #[test]
    fn a_batch_is_full_at_its_length_and_at_a_whole_reply() {
        let mut outbox = outbox();
        for entry in 0..20 {
            outbox.push(b"head", Some(Buf::zeroed(128 << 10)), entry);
        }
        let batches: Vec<_> = std::iter::from_fn(|| outbox.take()).map(Batch::into_parts).collect();
        assert_eq!(batches.iter().map(|(_, entries)| entries.len()).collect::<Vec<_>>(), [8, 8, 4]);
        assert!(batches.iter().all(|(buf, entries)| buf.len() == entries.len() * ((128 << 10) + 4)));
    }

    #[test]
    fn a_cleared_outbox_names_its_entries() {
        let mut outbox = outbox();
        for entry in 0..10 {
            outbox.push(b"head", Some(Buf::zeroed(1 << 20)), entry);
        }
        assert_eq!(outbox.clear().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        assert!(outbox.take().is_none());
    }
}
