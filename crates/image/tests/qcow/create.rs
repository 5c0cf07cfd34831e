//! Making images: byte for byte what `qemu-img create` makes.

use std::rc::Rc;

use image::ImageError;
use image::qcow::{Create, create};
use storage::{Ram, Storage};

use crate::tools::{bytes_of, made, qemu, ram, run, scratch, text};

#[test]
fn an_empty_image_is_the_one_that_qemu_img_makes() {
    let folder = scratch();
    let path = folder.path().join("theirs");
    for size in [512_u64, 1000, 1 << 20, (1 << 30) + 512, 300 << 30] {
        for backing in [None, Some("b"), Some("../some/where/base.raw")] {
            let bytes = size.to_string();
            let mut arguments = vec!["create", "-q", "-f", "qcow"];
            if let Some(name) = backing {
                arguments.extend(["-u", "-F", "raw", "-b", name]);
            }
            arguments.extend([text(&path), &bytes]);
            qemu("qemu-img", &arguments);
            let theirs = std::fs::read(&path).unwrap();
            run(async move |_| {
                let backing = backing.map(str::to_owned);
                let ours = bytes_of(&*made(Create { size, backing, cluster_size: None }).await).await;
                assert!(ours == theirs, "of {size} bytes over {backing:?}", backing = &ours[..80]);
            });
        }
    }
}

#[test]
fn what_was_in_the_file_is_gone() {
    run(async |_| {
        let fresh = bytes_of(&*made(Create { size: 1 << 30, ..Create::default() }).await).await;
        let file = ram(&[0xee; 100_000]).await;
        create(&file, &Create { size: 1 << 30, ..Create::default() }).await.unwrap();
        assert!(bytes_of(&*file).await == fresh);
    });
}

#[test]
fn what_cannot_be_made_is_refused() {
    run(async |_| {
        let name = |len: usize| Some("n".repeat(len));
        for options in [
            Create { size: 0, ..Create::default() },
            Create { size: u64::MAX, ..Create::default() },
            Create { size: 1 << 60, ..Create::default() },
            Create { size: 512, cluster_size: Some(256), ..Create::default() },
            Create { size: 512, cluster_size: Some(128 << 10), ..Create::default() },
            Create { size: 512, cluster_size: Some(1000), ..Create::default() },
            Create { size: 512, backing: name(0), ..Create::default() },
            Create { size: 512, backing: name(1024), ..Create::default() },
            Create { size: 512, backing: Some("a\0b".into()), ..Create::default() },
        ] {
            let file: Rc<dyn Storage> = Rc::new(Ram::new(10));
            let refused = create(&file, &options).await;
            assert!(matches!(refused, Err(ImageError::Refused(_))), "{options:?}: {refused:?}");
            assert_eq!(file.size(), 10, "nothing was touched");
        }
        made(Create { size: 512, backing: name(1023), ..Create::default() }).await;
    });
}
