//! Arrays that user space writes through shared memory instead of system calls (`BPF_F_MMAPABLE`).
#![expect(unsafe_code, reason = "memory shared with the kernel")]

use std::{
    marker::PhantomData,
    mem::MaybeUninit,
    num::NonZeroUsize,
    os::fd::BorrowedFd,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use lb_common::layout::MapValue;
use nix::{
    errno::Errno,
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
};

/// A BPF array of `T`, mapped into this process.
///
/// Programs and other threads read and write it at any time. An entry is read and written as 64-bit words,
/// and a last one of 32 bits if its size is not a multiple of 8, in no particular order. No word is torn, but
/// an entry may be: its words may belong to two writes. So write only unreferenced entries, and single words
/// (`store_u64`, `store_u32`) of entries in use.
#[derive(Debug)]
pub struct Mapped<T> {
    base: NonNull<u8>,
    len: NonZeroUsize,
    n_entries: u32,
    entry: PhantomData<T>,
}

// SAFETY: the mapping is shared memory without thread affinity; all access is through the methods below.
unsafe impl<T: MapValue + Send> Send for Mapped<T> {}
// SAFETY: methods that take `&self` access memory by atomic words alone, each word always in the same size.
unsafe impl<T: MapValue + Send> Sync for Mapped<T> {}

impl<T: MapValue> Mapped<T> {
    /// The kernel places array elements at multiples of eight octets.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps an array map with `n_entries` entries of type `T`.
    ///
    /// # Errors
    ///
    /// The system call's; `EINVAL` for a map that is not mappable or has fewer entries.
    pub fn new(map: BorrowedFd<'_>, n_entries: u32) -> Result<Self, Errno> {
        let size = usize::try_from(n_entries).map_err(|_too_large| Errno::E2BIG)? * Self::STRIDE;
        let len = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        // SAFETY: no address is requested, so no other mapping is touched.
        let base = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, map, 0)?
        };
        Ok(Self { base: base.cast(), len, n_entries, entry: PhantomData })
    }

    /// Number of entries.
    #[must_use]
    pub fn n_entries(&self) -> u32 {
        self.n_entries
    }

    fn at(&self, index: u32) -> Option<NonNull<T>> {
        if index >= self.n_entries {
            return None;
        }
        // SAFETY: below `n_entries`, so inside the mapping; 8-aligned, which suffices by `map_type!`.
        Some(unsafe { self.base.add(index as usize * Self::STRIDE) }.cast())
    }

    /// Reads an entry; `None` if out of range. An entry that is being written may be torn.
    #[must_use]
    pub fn read(&self, index: u32) -> Option<T> {
        let (words, tail) = self.words(index)?;
        let mut value = MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast::<u8>();
        for (n, word) in words.iter().enumerate() {
            // SAFETY: within `value`.
            unsafe { to.add(n * 8).cast::<u64>().write_unaligned(word.load(Ordering::Relaxed)) };
        }
        if let Some(word) = tail {
            // SAFETY: as above.
            unsafe { to.add(words.len() * 8).cast::<u32>().write_unaligned(word.load(Ordering::Relaxed)) };
        }
        // SAFETY: the words cover all octets, and every bit pattern is a `T`.
        Some(unsafe { value.assume_init() })
    }

    /// Writes an unreferenced entry; `false` if out of range.
    #[must_use]
    pub fn write(&self, index: u32, value: T) -> bool {
        let Some((words, tail)) = self.words(index) else { return false };
        let from = (&raw const value).cast::<u8>();
        for (n, word) in words.iter().enumerate() {
            // SAFETY: within `value`, which has no padding.
            word.store(unsafe { from.add(n * 8).cast::<u64>().read_unaligned() }, Ordering::Relaxed);
        }
        if let Some(word) = tail {
            // SAFETY: as above.
            let value = unsafe { from.add(words.len() * 8).cast::<u32>().read_unaligned() };
            word.store(value, Ordering::Relaxed);
        }
        true
    }

    /// The words of an entry.
    fn words(&self, index: u32) -> Option<(&[AtomicU64], Option<&AtomicU32>)> {
        const { assert!(size_of::<T>().is_multiple_of(4), "an entry is a sequence of words") };
        let (entry, n_words) = (self.at(index)?, size_of::<T>() / 8);
        // SAFETY: inside the mapping, which outlives the references, and 8-aligned. The kernel's side
        // accesses it as words, too.
        let words = unsafe { slice::from_raw_parts(entry.cast().as_ptr(), n_words) };
        let has_tail = !size_of::<T>().is_multiple_of(8);
        // SAFETY: as above, the last four octets of the entry.
        let tail = has_tail.then(|| unsafe { entry.cast::<u8>().add(n_words * 8).cast().as_ref() });
        Some((words, tail))
    }

    /// Stores one 64-bit word of an entry in use, after all earlier writes; `false` if out of range.
    ///
    /// `word` is the index of the word within the entry.
    #[must_use]
    pub fn store_u64(&mut self, index: u32, word: usize, value: u64) -> bool {
        self.word_u64(index, word).map(|word| word.store(value, Ordering::Release)).is_some()
    }

    /// Stores one 32-bit word of an entry in use, after all earlier writes; `false` if out of range.
    ///
    /// `word` is the index of the word within the entry.
    #[must_use]
    pub fn store_u32(&mut self, index: u32, word: usize, value: u32) -> bool {
        self.word_u32(index, word).map(|word| word.store(value, Ordering::Release)).is_some()
    }

    /// Replaces one 64-bit word of an entry in use if it has the expected value, and returns whether it had.
    ///
    /// `word` is the index of the word within the entry.
    #[must_use]
    pub fn replace_u64(&mut self, index: u32, word: usize, expected: u64, value: u64) -> bool {
        self.word_u64(index, word).is_some_and(|word| {
            word.compare_exchange(expected, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// Adds to an entry of 32 bits, modulo 2^32; `false` if out of range.
    #[must_use]
    pub fn add(&self, index: u32, number: u32) -> bool {
        const { assert!(size_of::<T>() == 4, "a single word") };
        let word = self.words(index).and_then(|(_none, word)| word);
        word.map(|word| word.fetch_add(number, Ordering::Relaxed)).is_some()
    }

    fn word_u64(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        let word = self.word(index, word * 8, 8)?;
        // SAFETY: inside the mapping, which outlives the reference, and 8-aligned; the kernel's side accesses
        // it as one word.
        Some(unsafe { AtomicU64::from_ptr(word.cast().as_ptr()) })
    }

    fn word_u32(&self, index: u32, word: usize) -> Option<&AtomicU32> {
        let word = self.word(index, word * 4, 4)?;
        // SAFETY: as above, and 4-aligned.
        Some(unsafe { AtomicU32::from_ptr(word.cast().as_ptr()) })
    }

    fn word(&self, index: u32, offset: usize, len: usize) -> Option<NonNull<u8>> {
        let entry = self.at(index)?;
        // SAFETY: within the entry, hence inside the mapping.
        (offset + len <= size_of::<T>()).then(|| unsafe { entry.cast::<u8>().add(offset) })
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; no reference into it is ever handed out.
        let result = unsafe { munmap(self.base.cast(), self.len.get()) };
        debug_assert!(result.is_ok(), "munmap of a whole mapping: {result:?}");
    }
}
